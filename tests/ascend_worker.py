"""A process of its own for MindFormers, whose context can be set only once: answers requests, one JSON a line.

A request is {"call": "<module>.<function>", "arguments": {...}}; the answer is {"result": ...} or {"error":
"<traceback>"}. Answers go to a descriptor of their own, because MindSpore prints to stdout.

Importing MindFormers, torch and transformers takes longer than most tests. So workers are forked from one process that
has imported them, the nursery: that of the environment variable PARENT, or the first worker starts it.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGES = os.path.join(os.path.dirname(HERE), "research", "qwen1_5")
PARENT = "QWEN15_TEST_NURSERY"
"""The environment variable that holds a nursery's socket."""
READY = b"ready\n"


class WorkerError(AssertionError):
    """A call ended in an exception; the message is its traceback."""


class Worker:
    """Starts the process and calls functions in it.

    Args:
        folder: its working directory; MindFormers writes its logs there.
    """

    def __init__(self, folder):
        read_end, write_end = os.pipe()
        paths = os.pathsep.join(filter(None, (PACKAGES, HERE, os.environ.get("PYTHONPATH"))))
        self._errors = open(os.path.join(folder, "worker.log"), "w+", encoding="utf-8")
        environ = {**os.environ, "PYTHONPATH": paths, "LOG_MF_PATH": os.path.join(folder, "log"), "GLOG_v": "3"}
        self._process = _Forked(folder, environ, write_end, self._errors.fileno())
        os.close(write_end)
        self._answers = os.fdopen(read_end, encoding="utf-8")

    def call(self, function: str, **arguments):
        """The result of `<module>.<function>(**arguments)`; both must be JSON."""
        self._process.stdin.write(json.dumps({"call": function, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        line = self._answers.readline()
        if not line:
            self._errors.seek(0)
            raise WorkerError(f"the worker died:\n{self._errors.read()[-3000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["result"]

    def close(self):
        """End the process."""
        self._process.kill()  # MindSpore's own end takes seconds
        self._process.stdin.close()
        self._answers.close()
        self._errors.close()


class _Forked:
    """A worker that a nursery has forked, whose child it is: nobody here learns how it ended."""

    def __init__(self, folder, environ, answers: int, errors: int):
        read_end, write_end = os.pipe()
        self.stdin = os.fdopen(write_end, "w", encoding="utf-8")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(nursery_socket())
            told = json.dumps({"folder": str(folder), "environ": environ}).encode()
            socket.send_fds(connection, [len(told).to_bytes(8, "big")], [read_end, answers, errors])
            connection.sendall(told)
            self.pid = int(connection.makefile().readline())
        os.close(read_end)

    def kill(self) -> None:
        """End it."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


class Nursery:
    """Starts a process that has imported what workers need and forks them, until `close`."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory()
        self.socket = os.path.join(self._folder.name, "socket")
        log = os.path.join(self._folder.name, "nursery.log")
        with open(log, "wb") as errors:
            self._process = subprocess.Popen([sys.executable, os.path.abspath(__file__), self.socket],
                                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                                             cwd=self._folder.name,
                                             env={**os.environ, "LOG_MF_PATH": self._folder.name, "GLOG_v": "3"})
        if READY not in iter(self._process.stdout.readline, b""):  # after what MindFormers prints
            with open(log, encoding="utf-8", errors="replace") as errors:
                raise WorkerError(f"the nursery has not started:\n{errors.read()[-3000:]}")

    def close(self) -> None:
        """End it; workers that it has forked end when nobody asks them any more."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._folder.cleanup()


@functools.lru_cache(maxsize=None)
def nursery_socket() -> str:
    """That of the nursery that workers are forked from; started where there is none."""
    if os.environ.get(PARENT):
        return os.environ[PARENT]
    nursery = Nursery()
    atexit.register(nursery.close)
    return nursery.socket


def _nurse(path: str) -> None:
    """Import, say READY, and fork a worker for each connection, until who started it is gone: stdin ends."""
    _import_mindformers()
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401
        from transformers import Qwen2ForCausalLM  # noqa: F401
    gc.freeze()  # MindSpore collects garbage whenever it compiles: a second for all that is imported
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries them
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    os.write(1, READY)
    while server in select.select([server, 0], [], [])[0]:
        connection, _ = server.accept()
        size, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
        told = json.loads(connection.makefile("rb").read(int.from_bytes(size, "big")))
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            server.close()
            _become(told, descriptors)
        connection.sendall(f"{child}\n".encode())
        connection.close()
        for descriptor in descriptors:
            os.close(descriptor)


def _become(told: dict, descriptors: list) -> None:
    """Serve as a worker that was started for itself would, then end without MindSpore's own end."""
    requests, answers, errors = descriptors
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    sys.stdin = os.fdopen(requests, encoding="utf-8")
    os.chdir(told["folder"])
    os.environ.clear()
    os.environ.update(told["environ"])
    sys.path[:0] = told["environ"]["PYTHONPATH"].split(os.pathsep)
    from mindformers.tools.hub import dynamic_module_utils

    dynamic_module_utils.HubConstants.OM_MODULES_CACHE = os.path.abspath("modules")  # not the user's
    try:
        _answer(answers)
    finally:
        os._exit(0)


def run_code(code: str, arguments: list, path: list) -> str:
    """What Python code prints, with `path` in place of what a worker looks through first."""
    for folder in (PACKAGES, HERE):
        sys.path.remove(folder)
    sys.path[:0] = path
    sys.argv = ["-c", *arguments]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {"__name__": "__main__"})
    return printed.getvalue()


def _import_mindformers() -> None:
    """As production does, which knows a way where MindFormers lacks a package; leaves no trace of ours behind."""
    sys.path.insert(0, PACKAGES)
    from qwen15.network.mindformers_import import import_mindformers

    import_mindformers()
    sys.path.remove(PACKAGES)
    for name in [name for name in sys.modules if name.split(".")[0] == "qwen15"]:
        del sys.modules[name]


def _answer(descriptor: int) -> None:
    with os.fdopen(descriptor, "w", encoding="utf-8") as answers:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                module, function = request["call"].rsplit(".", 1)
                answer = {"result": getattr(importlib.import_module(module), function)(**request["arguments"])}
            except Exception:
                answer = {"error": traceback.format_exc()}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    _nurse(sys.argv[1])
