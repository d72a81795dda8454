"""A process of its own for MindFormers, whose context can be set only once: answers requests, one JSON a line.

A request is {"call": "<module>.<function>", "arguments": {...}}; the answer is {"result": ...} or {"error":
"<traceback>"}. Answers go to a descriptor of their own, because MindSpore prints to stdout.
"""

import contextlib
import importlib
import io
import json
import os
import sys
import traceback

from fork_server import Job

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGES = os.path.join(os.path.dirname(HERE), "research", "qwen1_5")


class WorkerError(AssertionError):
    """A call ended in an exception; the message is its traceback."""


class Worker:
    """Starts the process and calls functions in it.

    Args:
        folder: its working directory; MindFormers writes its logs there.
    """

    def __init__(self, folder):
        paths = os.pathsep.join(filter(None, (PACKAGES, HERE, os.environ.get("PYTHONPATH"))))
        self._errors = open(os.path.join(folder, "worker.log"), "w+", encoding="utf-8")
        environ = {**os.environ, "PYTHONPATH": paths, "LOG_MF_PATH": os.path.join(folder, "log"), "GLOG_v": "3"}
        (requests, ours), (answers, theirs) = os.pipe(), os.pipe()
        with open(os.devnull, "rb") as nothing:
            errors = self._errors.fileno()
            self._job = Job("ascend_worker.warm_up", "ascend_worker.answer", [paths.split(os.pathsep)],
                            streams=[nothing.fileno(), errors, errors], more=[requests, theirs], folder=folder,
                            environ=environ)
        os.close(requests)
        os.close(theirs)
        self._requests, self._answers = os.fdopen(ours, "w", encoding="utf-8"), os.fdopen(answers, encoding="utf-8")

    def call(self, function: str, **arguments):
        """The result of `<module>.<function>(**arguments)`; both must be JSON."""
        self._requests.write(json.dumps({"call": function, "arguments": arguments}) + "\n")
        self._requests.flush()
        line = self._answers.readline()
        if not line:
            self._errors.seek(0)
            raise WorkerError(f"the worker died, exit code {self._job.wait(10)}:\n{self._errors.read()[-3000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["result"]

    def close(self):
        """End the process."""
        self._job.kill()  # MindSpore's own end takes seconds
        for each in (self._job, self._requests, self._answers, self._errors):
            each.close()


def warm_up() -> None:
    """Import MindFormers as production does, which knows a way where it lacks a package; leaves no trace of ours
    behind. Torch and transformers too, which judge it."""
    sys.path.insert(0, PACKAGES)
    from qwen15.network.mindformers_import import import_mindformers

    import_mindformers()
    sys.path.remove(PACKAGES)
    for name in [name for name in sys.modules if name.split(".")[0] == "qwen15"]:
        del sys.modules[name]
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401
        from transformers import Qwen2ForCausalLM  # noqa: F401


def answer(path: list, requests: int, answers: int) -> None:
    """Answer requests until there are no more, then end without MindSpore's own end.

    Args:
        path: folders that modules are looked for in first.
        requests, answers: descriptors.
    """
    sys.path[:0] = path
    from mindformers.tools.hub import dynamic_module_utils

    dynamic_module_utils.HubConstants.OM_MODULES_CACHE = os.path.abspath("modules")  # not the user's
    try:
        with os.fdopen(requests, encoding="utf-8") as asked, os.fdopen(answers, "w", encoding="utf-8") as told:
            for line in asked:
                told.write(json.dumps(_answer_to(json.loads(line))) + "\n")
                told.flush()
    finally:
        os._exit(0)


def _answer_to(request: dict) -> dict:
    try:
        module, function = request["call"].rsplit(".", 1)
        return {"result": getattr(importlib.import_module(module), function)(**request["arguments"])}
    except Exception:
        return {"error": traceback.format_exc()}


def run_code(code: str, arguments: list, path: list) -> str:
    """What Python code prints, with `path` in place of what a worker looks through first."""
    sys.path[:2] = path
    sys.argv = ["-c", *arguments]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {"__name__": "__main__"})
    return printed.getvalue()
