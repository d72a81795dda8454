"""A mapped file that becomes shorter under a command ends it with a line that names the file; other signals go on to
whoever had them."""

import os
import signal
import subprocess
import sys

import pytest
from command_fixtures import command, environment, make_random
from conftest import MODULE
from qwen15.errors import UserError
from qwen15.kernels import library

try:
    library.load()
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)

COMMAND = "from qwen15 import start\nstart.hold()\nstart.release()\n"
LOAD = "from qwen15.kernels import library\nlibrary.load()\n"
MAP = """
import mmap, os, sys, threading
with open(sys.argv[1], "r+b") as file:
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    os.truncate(file.fileno(), 4096)
"""
LOOK = "memory[-1]\n"
SENT = "import os, signal, time\nos.kill(os.getpid(), signal.SIGBUS)\nprint('alive')\n"
WHY = ("became shorter, or its disk cannot be read any more, while it was in use. To replace a file write the new one "
       "beside it and rename it; otherwise look at the disk.")


def run(program, *arguments):
    return subprocess.run([sys.executable, "-c", program, *map(str, arguments)], cwd=MODULE, capture_output=True,
                          text=True, timeout=240, env={**os.environ, "PYTHONFAULTHANDLER": ""})


def file_of_pages(folder, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(bytes(1 << 20))
    return folder / name


@pytest.mark.parametrize("name, shown", [
    ("模型 one.safetensors", "模型 one.safetensors"),
    ("m\x1b]0;x\x07\u202e\x85\n.ckpt", "m?]0;x???\\012.ckpt"),
    ("n" * 200 + ".ckpt", "n" * 200 + ".ckpt")])
def test_a_file_that_becomes_shorter_ends_a_command_with_its_name(tmp_path, name, shown):
    done = run(COMMAND + LOAD + MAP + LOOK, file_of_pages(tmp_path, name))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path}/{shown}: {WHY}\n"


def test_of_a_long_path_the_end_is_shown(tmp_path):
    folder = tmp_path / ("上" * 80)
    done = run(COMMAND + LOAD + MAP + LOOK, file_of_pages(folder, "海" * 70 + ".ckpt"))
    path = done.stderr[len("error: "):].partition(": became")[0]
    assert done.returncode == 1 and 297 <= len(path.encode()) <= 300 and f"{folder}/{'海' * 70}.ckpt".endswith(path)


def test_many_threads_that_look_at_once_tell_it_once(tmp_path):
    look = "for _ in range(8):\n    threading.Thread(target=lambda: bytes(memory)).start()\n"
    done = run(COMMAND + LOAD + MAP + look, file_of_pages(tmp_path))
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr


def test_a_program_that_only_imports_the_package_keeps_its_signals(tmp_path):
    assert run(LOAD + MAP + LOOK, file_of_pages(tmp_path)).returncode == -signal.SIGBUS


@pytest.mark.parametrize("before, code, said", [
    ("", -signal.SIGBUS, ""),
    ("import signal\nsignal.signal(signal.SIGBUS, signal.SIG_IGN)\n", 0, "alive\n"),
    ("import signal\nsignal.signal(signal.SIGBUS, lambda *_: print('theirs'))\n", 0, "theirs\nalive\n")])
def test_a_signal_that_somebody_sends_goes_to_whoever_had_it_before(before, code, said):
    done = run(before + COMMAND + LOAD + SENT)
    assert (done.returncode, done.stdout, done.stderr) == (code, said, "")


def test_a_handler_that_wants_to_know_more_is_called_with_it():
    done = run("import faulthandler\nfaulthandler.enable()\n" + COMMAND + LOAD + SENT)
    assert done.returncode == -signal.SIGBUS and "Fatal Python error: Bus error" in done.stderr


def test_a_checkpoint_that_becomes_shorter_under_a_conversation_ends_it_with_1(tmp_path, small_model):
    pytest.importorskip("mindspore")
    yaml = make_random(tmp_path, small_model)
    weights = tmp_path / "random" / "model.safetensors"
    process = subprocess.Popen(command("--config", yaml, "--chat", "--max_new_tokens", 4), cwd=MODULE, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=environment())
    process.stdin.write("hello\n")
    process.stdin.flush()
    assert process.stdout.readline()
    os.truncate(weights, 4096)
    _, told = process.communicate("hello\n/quit\n", timeout=240)
    assert process.returncode == 1, told
    assert told.splitlines()[-1] == f"error: {weights}: {WHY}"
