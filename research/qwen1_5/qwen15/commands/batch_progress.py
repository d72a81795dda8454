"""The progress of many prompts: how many are finished, tokens/s and the time left."""

from __future__ import annotations

import time
from typing import Any, Dict, List, Mapping, TextIO, Tuple

from ..generation.request import Usage
from ..generation.session import Piece
from ..progress import human_time
from .results import guesses

_LINE_EVERY_S = 30.0


class BatchProgress:
    """How many prompts are finished, tokens/s and the time left: one line that is rewritten on a terminal, else a line
    now and then.

    Args:
        total: prompts in all.
        stream: stderr.
        shown: False keeps silent.
        clock: seconds, for tests.
    """

    def __init__(self, total: int, stream: TextIO, shown: bool = True, clock: Any = time.monotonic):
        self._total, self._stream, self._clock = total, stream, clock
        self._tty = stream.isatty()
        self._shown = shown
        self._begin_s = clock()
        self._next_s = self._begin_s + (0.2 if self._tty else _LINE_EVERY_S)
        self._finished = 0
        self._running: Dict[Tuple[int, int], Any] = {}
        self._missing: Dict[int, int] = {}
        self._prompt_tokens = self._new_tokens = 0
        self._width = 0
        self._usages: List[Usage] = []

    def take(self, piece: Piece) -> None:
        """More of an answer."""
        self._running[piece.index, piece.choice] = piece.answer
        if piece.usage is not None:
            self._count(piece, piece.usage)
        self._show_now_and_then()

    def finished(self, result: Mapping[str, Any]) -> None:
        """A prompt is finished elsewhere; `result` is what JSON has of it."""
        self._finished += 1
        self._prompt_tokens += result["prompt_tokens"]
        self._new_tokens += sum(answer["generated_tokens"] for answer in result.get("answers", (result,)))
        self._show_now_and_then()

    def line(self, elapsed_s: float) -> str:
        """The line for a time since the start."""
        new = self._new_tokens + sum(len(answer.token_ids) for answer in self._running.values())
        text = (f"{self._finished} of {self._total} prompts, {len(self._running)} running, "
                f"{new / max(elapsed_s, 1e-9):.1f} tokens/s")
        if self._finished:
            text += f", {human_time(elapsed_s / self._finished * (self._total - self._finished))} left"
        return text

    def finish(self) -> str:
        """Take the line away; returns what is to be said at the end."""
        if self._shown and self._tty and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
        total_s = self._clock() - self._begin_s
        return (f"{self._finished} prompts, {self._prompt_tokens} prompt tokens and {self._new_tokens} new tokens in "
                f"{total_s:.2f} s: {self._new_tokens / max(total_s, 1e-9):.1f} new tokens/s{guesses(self._usages)}")

    def _count(self, piece: Piece, usage: Usage) -> None:
        self._running.pop((piece.index, piece.choice), None)
        missing = self._missing.pop(piece.index, piece.answer.siblings) - 1
        if missing:
            self._missing[piece.index] = missing
        else:
            self._finished += 1
            self._prompt_tokens += usage.prompt_tokens
        self._new_tokens += usage.generated_tokens
        self._usages.append(usage)

    def _show_now_and_then(self) -> None:
        now_s = self._clock()
        if self._shown and now_s >= self._next_s:
            self._next_s = now_s + (0.2 if self._tty else _LINE_EVERY_S)
            self._show(self.line(now_s - self._begin_s))

    def _show(self, text: str) -> None:
        if self._tty:
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()
