"""Commands run in forks of one process that has imported MindSpore: each starts in a tenth of a second, not in five.

What runs is what a user runs, from the command line on, with its own arguments, folder, environment, streams and exit
code, or in a terminal of its own. Starting itself and signals while it starts are tested with real processes.
"""

import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
from pathlib import Path

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


def run(arguments, cwd, env, stdin="", timeout=300):
    """Run `python SCRIPT ARGUMENT...` to its end in a fork.

    Args:
        arguments: the script, by its path, or `-m` and a module; then its arguments.
        cwd, env, stdin, timeout: as `subprocess.run` has them; seconds.

    Returns:
        subprocess.CompletedProcess with text streams; a signal's number is negative.
    """
    inner, outer = zip(*(os.pipe() for _ in range(3)))  # stdin, stdout, stderr: read ends, write ends
    given = [inner[0], outer[1], outer[2]]
    with Command(arguments, cwd, env, given) as command:
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
        code = command.wait(timeout)
        if code is None:
            os.kill(command.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(arguments, timeout)
        for reader in readers:
            reader.join()
    return subprocess.CompletedProcess(arguments, code,
                                       *(text.decode("utf-8", "replace").replace("\r\n", "\n") for text in said))


class Command:
    """A command that runs; `streams` are its stdin, stdout and stderr, or one descriptor: the terminal it is to have.

    Attributes:
        pid: of its process, which is nobody's child here.
    """

    def __init__(self, arguments, cwd, env, streams):
        self._call, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(_server(), [b"run"], [theirs.fileno(), *streams])
        self._call.sendall(json.dumps([list(map(str, arguments)), str(cwd), env]).encode() + b"\n")
        self._answers = self._call.makefile("rb", buffering=0)  # nothing is read ahead: `wait` looks at the socket
        self.pid = int(self._answers.readline())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._answers.close()
        self._call.close()

    def wait(self, timeout):
        """Its exit code, a signal's number negative; None where it has not ended after so many seconds."""
        if not select.select([self._call], [], [], timeout)[0]:
            return None
        return os.waitstatus_to_exitcode(int(self._answers.readline()))


_running = None


def _server():
    """The way to the warm process, which ends when this one does."""
    global _running
    if _running is None or _running[0].poll() is not None:
        ours, theirs = socket.socketpair()
        environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # only a process of one thread can be forked
        with theirs:
            process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], cwd=MODULE, env=environ,
                                       pass_fds=[theirs.fileno()], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE)  # as a command's: Python looks at what they are
        if not ours.recv(16):
            raise AssertionError(process.stderr.read().decode())
        _running = process, ours
    return _running[1]


def _serve(calls):
    """Fork for every call; returns, in the fork, its arguments."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with calls:
        calls.sendall(b"ready")
        while True:
            message, fds, _, _ = socket.recv_fds(calls, 16, 4)
            if not message:
                os._exit(0)
            if os.fork() == 0:
                break
            for fd in fds:
                os.close(fd)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
    call = socket.socket(fileno=fds[0])
    pid = os.fork()
    if pid:  # waits for the command and says how it ended
        for fd in fds[1:]:
            os.close(fd)
        call.sendall(b"%d\n" % pid)
        call.sendall(b"%d\n" % os.waitpid(pid, 0)[1])
        os._exit(0)
    with call.makefile("rb") as file:
        arguments, cwd, environ = json.loads(file.readline())
    call.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    streams = fds[1:]
    if len(streams) == 1:
        os.setsid()
        fcntl.ioctl(streams[0], termios.TIOCSCTTY, 0)
        streams *= 3
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
    for fd in fds[1:]:
        os.close(fd)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    return arguments


def _warm_up():
    from qwen15.reporting import quiet_frameworks

    quiet_frameworks("info")
    for name in _NEEDED:
        importlib.import_module(name)
    gc.freeze()  # MindSpore collects garbage whenever it compiles: forks need not look through what is imported
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: a fork would lose all but one"


if __name__ == "__main__":
    sys.path[0] = str(MODULE)
    _warm_up()
    sys.argv = _serve(socket.socket(fileno=int(sys.argv[1])))
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
