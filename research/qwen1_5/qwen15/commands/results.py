"""What is printed of answers: text as it streams, JSON objects, the timing line."""

from __future__ import annotations

from typing import IO, Any, Callable, Dict, List, Sequence

from .. import strict_json, terminal
from ..generation.request import CANCELLED, Usage
from ..generation.session import Answer, Piece
from .prompts import Entry


class Text:
    """Prompts and continuations, streamed. One prompt's text is never mixed with another's: the others wait their turn.

    Args:
        out: where to; on a terminal nothing in a text is obeyed.
        heads: printed before each answer, the prompt when it is to be shown.
    """

    def __init__(self, out: IO[str], heads: Sequence[str]):
        self._out = out
        self._on_terminal = out.isatty()
        self._waiting = list(heads)
        self._finished = [False] * len(heads)
        self._turn = 0
        self._within_line = False
        self._write()

    def take(self, piece: Piece) -> None:
        """More of an answer."""
        self._waiting[piece.index] += piece.text
        if piece.usage is not None:
            self._waiting[piece.index] += "\n"
            self._finished[piece.index] = True
        if piece.index == self._turn:
            self._write()
            while self._turn < len(self._waiting) and self._finished[self._turn]:
                self._turn += 1
                self._write()

    def close(self) -> None:
        """No more comes, perhaps in the middle of an answer: whatever is said next begins on a line of its own."""
        if self._within_line:
            self._out.write("\n")
            self._out.flush()
            self._within_line = False

    def _write(self) -> None:
        if self._turn < len(self._waiting) and self._waiting[self._turn]:
            text = printable(self._waiting[self._turn])
            self._out.write(terminal.answer(text) if self._on_terminal else text)
            self._out.flush()
            self._within_line = not self._waiting[self._turn].endswith("\n")
            self._waiting[self._turn] = ""


class JsonLines:
    """One JSON object per finished prompt; `text` and `token_ids` are the continuation's.

    Args:
        entries: the prompts, as the engine numbers them.
        write: takes the number of a prompt and its result.
        in_order: in the order of the prompts; otherwise in the order in which they finish.
    """

    def __init__(self, entries: Sequence[Entry], write: Callable[[int, Dict[str, Any]], None], in_order: bool):
        self._entries, self._write, self._in_order = entries, write, in_order
        self._ready: Dict[int, Dict[str, Any]] = {}
        self._turn = 0

    def take(self, piece: Piece) -> None:
        """More of an answer; nothing is written before it has ended."""
        if piece.usage is None or piece.answer.finish_reason == CANCELLED:
            return
        self._ready[piece.index] = record(self._entries[piece.index], piece.answer, piece.usage)
        for index in [piece.index] if not self._in_order else range(self._turn, len(self._entries)):
            if index not in self._ready:
                break
            self._write(self._entries[index].index, self._ready.pop(index))
            self._turn = index + 1

    def close(self) -> None:
        """No more comes."""


def record(entry: Entry, answer: Answer, usage: Usage) -> Dict[str, Any]:
    """A finished answer as JSON has it: `prompt` is the text, or `messages` those of a conversation; times in seconds."""
    made: Dict[str, Any] = {"index": entry.index}
    if entry.name is not None:
        made["id"] = entry.name
    made["prompt" if isinstance(entry.source, str) else "messages"] = entry.source
    made.update({"text": answer.text, "token_ids": answer.token_ids, "prompt_tokens": usage.prompt_tokens,
                 "generated_tokens": len(answer.token_ids), "finish_reason": answer.finish_reason,
                 "prefill_s": round(usage.prefill_s, 6), "decode_s": round(usage.decode_s, 6)})
    if answer.logprobs:
        made["logprobs"] = answer.logprobs
    return made


def write_line(out: IO[str], index: int, value: Dict[str, Any]) -> None:
    """A result on stdout, at once."""
    out.write(strict_json.dumps(value) + "\n")
    out.flush()


def printable(text: str) -> str:
    """`text` with lone surrogates, which no terminal or file can take, as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def summary(usages: List[Usage], total_s: float) -> str:
    """The timing line. Requests of a batch share their calls, so the longest times are those of the calls."""
    prompt = sum(u.prompt_tokens - u.cached_tokens for u in usages)
    # The first token comes out of prefill; decode makes the rest.
    decoded = sum(max(u.generated_tokens - 1, 0) for u in usages)
    prefill_s = max((u.prefill_s for u in usages), default=0.0)
    decode_s = max((u.decode_s for u in usages), default=0.0)
    line = f"prefill {prompt} tokens in {prefill_s:.2f} s ({prompt / max(prefill_s, 1e-9):.1f} tokens/s)"
    if decoded:
        line += f", decode {decoded} tokens in {decode_s:.2f} s ({decoded / max(decode_s, 1e-9):.1f} tokens/s)"
    return f"{line}, {total_s:.2f} s in all"
