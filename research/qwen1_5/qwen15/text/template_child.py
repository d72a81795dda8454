"""The process that renders chat templates of checkpoints: little memory, little time, and nothing of ours to lose.

On stdin and stdout: the length of a message as 8 bytes, then the message as JSON. Started by `template_process`.
"""

from __future__ import annotations

import json
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO, Dict

from . import template_engine

LENGTH = struct.Struct("<Q")
_MEMORY_BYTES = 2 ** 30
"""Address space; Python with Jinja has about 50 MB of it."""


def main() -> None:
    """Answer requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the terminal is the other process's
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, target = sys.stdin.buffer, sys.stdout.buffer
    while True:
        head = source.read(LENGTH.size)
        if len(head) < LENGTH.size:
            return
        request = json.loads(source.read(LENGTH.unpack(head)[0]))
        _send(target, _answer(request))


def _answer(request: Dict[str, Any]) -> Dict[str, Any]:
    # Processor time, so that a busy machine changes nothing. The signal ends the process, also within one long step.
    signal.setitimer(signal.ITIMER_PROF, request["most_s"])
    try:
        return {"text": template_engine.render(request["template"], request["variables"], request["most_characters"])}
    except template_engine.Refused as error:
        return {"refused": str(error)[:2000]}
    except Exception as error:  # whatever a hostile template does
        return {"refused": f"the chat template fails on these messages: {type(error).__name__}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _send(target: BinaryIO, answer: Dict[str, Any]) -> None:
    message = json.dumps(answer).encode("ascii")
    target.write(LENGTH.pack(len(message)) + message)
    target.flush()
