"""A process of its own for MindFormers, whose context can be set only once: answers requests, one JSON a line.

A request is {"call": "<module>.<function>", "arguments": {...}}; the answer is {"result": ...} or {"error":
"<traceback>"}. Answers go to the descriptor named on the command line, because MindSpore prints to stdout.
"""

import importlib
import json
import os
import subprocess
import sys
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGES = os.path.join(os.path.dirname(HERE), "research", "qwen1_5")


class WorkerError(AssertionError):
    """A call ended in an exception; the message is its traceback."""


class Worker:
    """Starts the process and calls functions in it.

    Args:
        folder: its working directory; MindFormers writes its logs there.
        environ: additional environment variables.
    """

    def __init__(self, folder, **environ):
        read_end, write_end = os.pipe()
        paths = os.pathsep.join(filter(None, (PACKAGES, HERE, os.environ.get("PYTHONPATH"))))
        self._errors = open(os.path.join(folder, "worker.log"), "w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), str(write_end)], stdin=subprocess.PIPE, stdout=self._errors,
            stderr=self._errors, cwd=folder, pass_fds=(write_end,), text=True,
            env={**os.environ, "PYTHONPATH": paths, "LOG_MF_PATH": os.path.join(folder, "log"), "GLOG_v": "3",
                 **environ})
        os.close(write_end)
        self._answers = os.fdopen(read_end, encoding="utf-8")

    def call(self, function: str, **arguments):
        """The result of `<module>.<function>(**arguments)`; both must be JSON."""
        self._process.stdin.write(json.dumps({"call": function, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        line = self._answers.readline()
        if not line:
            self._errors.seek(0)
            raise WorkerError(f"the worker died (exit code {self._process.wait()}):\n{self._errors.read()[-3000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["result"]

    def close(self):
        """End the process."""
        self._process.kill()  # MindSpore's own end takes seconds
        self._process.wait()
        self._process.stdin.close()
        self._answers.close()
        self._errors.close()


def _import_mindformers() -> None:
    """As production does, which knows a way where MindFormers lacks a package; leaves no trace of ours behind."""
    sys.path.insert(0, PACKAGES)
    from qwen15.network.mindformers_import import import_mindformers

    import_mindformers()
    sys.path.remove(PACKAGES)
    for name in [name for name in sys.modules if name.split(".")[0] == "qwen15"]:
        del sys.modules[name]


def _serve(descriptor: int) -> None:
    _import_mindformers()
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
    _serve(int(sys.argv[1]))
