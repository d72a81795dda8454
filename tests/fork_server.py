"""A process that has imported what takes seconds to import, and forks: a job in it starts in milliseconds.

Whoever first asks for a server starts it; all processes of a test run share it: those that pytest-xdist starts too, and
what the tests start. It ends with the process that `folder` was first called in.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios

RUN = "QWEN15_TEST_SERVERS"
"""The environment variable that holds the run's owner, a process, and the folder of its servers' sockets."""
READY = b"ready\n"
_started = []


class ServerError(AssertionError):
    """A server has not started, or has died; the message ends with its log."""


class Job:
    """A call of a function in a fork of a server, with the streams, the folder and the environment of a process of its
    own. What it does when the function returns is what Python does at the end of a program.

    Args:
        server: "module.function" that imports what the jobs need; there is one server for each.
        call: "module.function" of the job.
        arguments: for it, JSON.
        streams: descriptors of its stdin, stdout and stderr, or one: the terminal it is to have.
        folder: its working directory.
        environ: all of its environment variables.
        more: further descriptors, which follow the arguments.

    Attributes:
        pid: of its process, which is nobody's child here.

    Raises:
        ServerError: the server does not start.
    """

    def __init__(self, server, call, arguments, *, streams, folder, environ, more=()):
        self._connection = _connect(server)
        told = json.dumps({"call": call, "arguments": arguments, "streams": len(streams), "folder": str(folder),
                           "environ": dict(environ)}).encode()
        socket.send_fds(self._connection, [len(told).to_bytes(8, "big")], [*streams, *more])
        self._connection.sendall(told)
        self._answers = self._connection.makefile("rb", buffering=0)  # reads nothing ahead: `wait` looks at the socket
        self.pid = self._number()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Hear no more of it; it goes on."""
        self._answers.close()
        self._connection.close()

    def wait(self, timeout_s=None):
        """Its exit code, a signal's number negative; None where it has not ended after so many seconds."""
        if not select.select([self._connection], [], [], timeout_s)[0]:
            return None
        return os.waitstatus_to_exitcode(self._number())

    def kill(self):
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def _number(self):
        line = self._answers.readline()
        if not line:
            raise ServerError("the process that forks has died")
        return int(line)


def folder():
    """(process that owns the servers, folder of their sockets); this process becomes the owner where none is known."""
    if RUN not in os.environ:
        made = tempfile.mkdtemp(prefix="qwen15-servers-")
        atexit.register(_remove, os.getpid(), made)
        os.environ[RUN] = f"{os.getpid()} {made}"
    owner, path = os.environ[RUN].split(" ", 1)
    return int(owner), path


def _remove(owner, path):
    if os.getpid() == owner:  # not at the end of a fork
        shutil.rmtree(path, ignore_errors=True)


def _connect(server):
    owner, where = folder()
    path = os.path.join(where, server)
    with open(f"{path}.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process starts it, the others wait until it is there
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            _start(server, path, owner)
            connection.connect(path)
    return connection


def _start(server, path, owner):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    # OpenBLAS with one thread: the threads of a process are not in its forks. Pipes as streams: Python looks at what
    # they are, and a command's are often pipes.
    environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "GLOG_v": "3", "LOG_MF_PATH": os.path.dirname(path)}
    process = subprocess.Popen([sys.executable, os.path.abspath(__file__), server, path, str(owner)],
                               cwd=os.path.dirname(path), env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    if process.stdout.readline() != READY:
        process.kill()
        process.wait()
        with open(f"{path}.log", encoding="utf-8", errors="replace") as log:
            raise ServerError(f"{server} does not start:\n{log.read()[-3000:]}")
    _started.append(process)


def main(server, path, owner):
    """Import, say READY, and fork until the owner is gone; returns, in a fork, the call that it is to make."""
    asked = os.dup(1)
    with open(f"{path}.log", "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _function(server)()
    gc.freeze()  # MindSpore collects garbage whenever it compiles: forks need not look through what is imported
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    os.write(asked, READY)
    os.close(asked)
    jobs = {}
    while os.path.exists(f"/proc/{owner}"):
        ready = select.select([listener, ended], [], [], 1)[0]
        if ended in ready:
            os.read(ended, 4096)
            _tell_ends(jobs)
        if listener in ready:
            connection = listener.accept()[0]
            size, descriptors, _, _ = socket.recv_fds(connection, 8, 8)
            told = json.loads(connection.makefile("rb").read(int.from_bytes(size, "big")))
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for number in (ended, wake):
                    os.close(number)
                for each in (listener, connection, *jobs.values()):
                    each.close()
                return _become(told, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            jobs[pid] = connection
            _say(connection, pid)
    os._exit(0)


def _tell_ends(jobs):
    """Say how the jobs have ended that have, to those who still listen."""
    while jobs:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        connection = jobs.pop(pid, None)  # None: a child of something that was imported
        if connection is not None:
            _say(connection, status)
            connection.close()


def _say(connection, number):
    with contextlib.suppress(OSError):  # who asked is gone
        connection.sendall(b"%d\n" % number)


def _become(told, descriptors):
    """Make this fork what was asked for; returns the call."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    streams, more = descriptors[:told["streams"]], descriptors[told["streams"]:]
    if len(streams) == 1:
        os.setsid()
        fcntl.ioctl(streams[0], termios.TIOCSCTTY, 0)
    for number in range(3):
        os.dup2(streams[number % len(streams)], number)
    for descriptor in streams:
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(told["environ"])
    os.chdir(told["folder"])
    return lambda: _function(told["call"])(*told["arguments"], *more)


def _function(name):
    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(module), function)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))()
