"""The script that tests the second pair of versions says by name, and by its exit code, when the disk has no room for
it."""

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "test_second_stack.sh"


def test_another_pair_is_refused():
    done = subprocess.run(["bash", str(SCRIPT), "--pair", "2.11.0"], stderr=subprocess.PIPE, universal_newlines=True,
                          timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("usage: test_second_stack.sh [--pair 2.10.0|2.7.2]")


def test_a_full_disk_is_named_and_nothing_is_begun(tmp_path):
    df = tmp_path / "df"
    df.write_text("#!/bin/sh\necho 'Filesystem 1M-blocks Used Available Capacity Mounted on'\necho '/dev/sda1 100000 "
                  "99000 1000 99% /'\n")
    df.chmod(0o755)
    venv = tmp_path / "disk" / "venv"
    done = subprocess.run(["bash", str(SCRIPT)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=60,
                          env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}",
                               "QWEN15_SECOND_VENV": str(venv)})
    assert done.returncode == 77
    assert done.stderr.startswith("skipped: mindspore 2.10.0, mindformers 2.0.0 needs ")
    assert f"{tmp_path} has 1000 MiB" in done.stderr and "QWEN15_SECOND_VENV" in done.stderr
    assert not venv.parent.exists()
