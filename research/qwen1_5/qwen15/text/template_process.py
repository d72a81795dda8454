"""Chat templates rendered in a process of their own, which may be ended: a template is a stranger's program."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from typing import IO, Any, Dict, Mapping, Optional

from .template_child import LENGTH
from .template_engine import Refused

LONGEST_TEMPLATE = 2 ** 20
"""Characters; those of published models have up to 20 000."""
_MOST_S = 3.0
_MOST_CHARACTERS = 16 * 2 ** 20
_PER_BYTE_S = 1e-6
"""Of time for every byte of messages, beside `_MOST_S`."""


class Renderer:
    """The child process, started with the first template. Safe in several threads; a fork starts another child."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: Optional[subprocess.Popen] = None
        self._owner = 0

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The text that `template` makes of `variables`, which are JSON.

        Raises:
            Refused: as `template_engine.render`; and when it takes too long, too much memory, or breaks the process.
        """
        if len(template) > LONGEST_TEMPLATE:
            raise Refused(f"the chat template has {len(template)} characters, more than {LONGEST_TEMPLATE}")
        try:
            values = json.dumps(variables)
        except (TypeError, ValueError, RecursionError) as error:
            raise Refused(f"the messages are more than texts, numbers and lists: {error}") from None
        most_s = _MOST_S + _PER_BYTE_S * len(values)
        message = (f'{{"template": {json.dumps(template)}, "variables": {values}, "most_s": {most_s}, '
                   f'"most_characters": {_MOST_CHARACTERS + 4 * len(values)}}}').encode("ascii")
        with self._lock:
            answer = self._ask(message)
            if answer is None:
                raise Refused(self._why(most_s))
        if "refused" in answer:
            raise Refused(answer["refused"])
        return answer["text"]

    def _ask(self, message: bytes) -> Optional[Dict[str, Any]]:
        """The child's answer; None when it has ended instead."""
        child = self._started()
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(LENGTH.pack(len(message)) + message)
            child.stdin.flush()
            head = _exactly(child.stdout, LENGTH.size)
            body = None if head is None else _exactly(child.stdout, LENGTH.unpack(head)[0])
        except BrokenPipeError:
            return None
        except BaseException:  # a Ctrl-C between question and answer: the next question must not get this one's answer
            self._end()
            raise
        return None if body is None else json.loads(body)

    def _started(self) -> subprocess.Popen:
        if self._child is None or self._child.poll() is not None or self._owner != os.getpid():
            code = "from qwen15.text.template_child import main; main()"
            places = os.pathsep.join(os.path.abspath(place) for place in sys.path)
            # Away from the working folder, which may be the stranger's and hold a json.py.
            self._child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                           stderr=subprocess.DEVNULL, cwd="/", env={**os.environ, "PYTHONPATH": places})
            self._owner = os.getpid()
            atexit.register(self._end)
        return self._child

    def _why(self, most_s: float) -> str:
        assert self._child is not None
        code = self._child.wait()
        self._end()
        if code == -signal.SIGPROF:
            return f"the chat template is not done after {most_s:.0f} s"
        return (f"the chat template breaks the process that renders it (exit code {code}): it is too large or nested "
                "too deeply")

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            atexit.unregister(self._end)
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except OSError:
                        pass


def _exactly(source: IO[bytes], count: int) -> Optional[bytes]:
    data = source.read(count)
    return data if len(data) == count else None
