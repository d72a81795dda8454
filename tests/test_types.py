"""The package promises types (py.typed): mypy finds nothing wrong in it, and finds a program's mistakes with it."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT

PROGRAM = """
from typing import List
import qwen15

with qwen15.load("folder", seq_length=128) as model:
    one: qwen15.Generation = qwen15.generate(model, "text", max_new_tokens=4)
    several: List[qwen15.Generation] = qwen15.generate(model, ["text", "text"])
    pieces: List[str] = list(model.stream("text"))
    answer: str = model.chat([{"role": "user", "content": "text"}]).text
tensors: int = qwen15.convert("source", "target", dtype="float32").tensors
"""
WRONG = """
import qwen15

model = qwen15.load(3)
number: int = qwen15.generate(model, "text").text
qwen15.convert("source", "target", dtyp="float32")
"""


def mypy(*arguments):
    done = subprocess.run([sys.executable, "-m", "mypy", "--no-color-output", *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_package_passes():
    code, said = mypy()
    assert code == 0, said


def test_a_program_that_uses_the_python_interface_is_checked_by_its_types(tmp_path):
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(PROGRAM)
    wrong.write_text(WRONG)
    code, said = mypy(right, wrong)
    assert code == 1 and "right.py" not in said
    assert [line.split(":")[1] for line in said.splitlines() if "error:" in line] == ["4", "5", "6"], said
