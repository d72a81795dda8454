"""Commands run in forks of one process that has imported MindSpore: each starts in a tenth of a second, not in five.

What runs is what a user runs, from the command line on, with its own arguments, folder, environment, streams and exit
code, or in a terminal of its own. Starting itself and signals while it starts are tested with real processes.
"""

import contextlib
import importlib
import os
import runpy
import subprocess
import sys
import threading
from pathlib import Path

from fork_server import Job

MODULE = Path(__file__).resolve().parent.parent / "research" / "qwen1_5"
READ_AT_START = ("PYTHON", "LANG", "LC_", "GLOG", "MS_", "LD_", "OMP_", "OPENBLAS", "MKL", "ASCEND")
"""Beginnings of variables that the interpreter or a library reads when it is loaded, which is too early for a fork."""
_NEEDED = ("mindspore.nn", "mindspore.ops", "qwen15.commands.predict", "qwen15.commands.repl", "qwen15.commands.batch",
           "qwen15.generation.session", "qwen15.network.model", "qwen15.network.cpu", "qwen15.ops.cpu",
           "qwen15.text.tokenizer")


def can_run(arguments, environ):
    """Whether this command does in a fork what it does by itself; at level debug MindSpore's own notes are wanted."""
    changed = {name for name in {*environ, *os.environ} if environ.get(name) != os.environ.get(name)}
    return "debug" not in arguments and not any(name.startswith(READ_AT_START) for name in changed)


def start(arguments, cwd, env, streams):
    """The `Job` of `python SCRIPT ARGUMENT...` in a fork; `streams` are its stdin, stdout and stderr, or its terminal.

    Args:
        arguments: the script, by its path, or `-m` and a module; then its arguments.
        cwd, env: as `subprocess.run` has them.
    """
    return Job("warm_commands.warm_up", "warm_commands.carry_out", [list(map(str, arguments))], streams=streams,
               folder=cwd, environ=env)


def run(arguments, cwd, env, stdin="", timeout=300):
    """As `start`, to its end.

    Args:
        stdin, timeout: as `subprocess.run` has them; seconds.

    Returns:
        subprocess.CompletedProcess with text streams; a signal's number is negative.
    """
    inner, outer = zip(*(os.pipe() for _ in range(3)))  # stdin, stdout, stderr: read ends, write ends
    given = [inner[0], outer[1], outer[2]]
    with start(arguments, cwd, env, given) as job:
        for fd in given:
            os.close(fd)
        said = [b"", b""]

        def read(index, fd):
            with open(fd, "rb") as file:
                said[index] = file.read()

        readers = [threading.Thread(target=read, args=(i, fd)) for i, fd in enumerate(inner[1:])]
        for reader in readers:
            reader.start()
        with contextlib.suppress(BrokenPipeError), open(outer[0], "wb") as file:
            file.write(stdin.encode())
        code = job.wait(timeout)
        if code is None:
            job.kill()
            raise subprocess.TimeoutExpired(arguments, timeout)
        for reader in readers:
            reader.join()
    return subprocess.CompletedProcess(arguments, code,
                                       *(text.decode("utf-8", "replace").replace("\r\n", "\n") for text in said))


def warm_up():
    """Import what commands need."""
    sys.path[0] = str(MODULE)
    from qwen15.reporting import quiet_frameworks

    quiet_frameworks("info")
    for name in _NEEDED:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: a fork would lose all but one"


def carry_out(arguments):
    """Be the command."""
    sys.argv = arguments
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
