"""Calls of functions in an answer: Qwen2.5 writes each as `<tool_call>` JSON `</tool_call>`, in Hermes' form."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called; `arguments` is JSON text, as OpenAI has it."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def openai(self) -> Dict[str, Any]:
        """OpenAI's object."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ToolCalls:
    """Takes an answer's text piece by piece and keeps calls apart from what is said.

    A call that is not valid, or is never closed, stays text: nothing that the model has written gets lost.
    """

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str, last: bool) -> Tuple[str, List[ToolCall]]:
        """Text that is certain to be no call, and the calls that have come to an end."""
        self._held += text
        said = ""
        calls: List[ToolCall] = []
        while True:
            start = self._held.find(OPEN)
            if start < 0:
                keep = 0 if last else _possible_start(self._held)
                said += self._held[:len(self._held) - keep]
                self._held = self._held[len(self._held) - keep:]
                return said, calls
            end = self._held.find(CLOSE, start)
            if end < 0:
                said += self._held[:start]
                self._held = self._held[start:]
                if last:
                    call = _parsed(self._held[len(OPEN):])
                    if call is not None:  # a model that ends right after the JSON has still made the call
                        calls.append(call)
                    else:
                        said += self._held
                    self._held = ""
                return said, calls
            whole = self._held[start:end + len(CLOSE)]
            call = _parsed(whole[len(OPEN):-len(CLOSE)])
            said += self._held[:start] + (whole if call is None else "")
            if call is not None:
                calls.append(call)
            self._held = self._held[end + len(CLOSE):]


def _possible_start(text: str) -> int:
    """Characters at the end of the text that may be the beginning of OPEN."""
    return next((length for length in range(len(OPEN) - 1, 0, -1) if text.endswith(OPEN[:length])), 0)


def _parsed(text: str) -> Optional[ToolCall]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    return ToolCall(value["name"], json.dumps(value.get("arguments", {}), ensure_ascii=False))
