"""What is printed of answers: text as it streams, JSON objects, the timing line."""

from __future__ import annotations

from typing import IO, Any, Callable, Dict, List, Optional, Sequence, Tuple

from .. import strict_json, terminal
from ..generation.request import CANCELLED, Usage
from ..generation.session import Answer, Piece
from .prompts import PromptEntry

Ended = List[Tuple[Answer, Usage]]
"""A prompt's answers, all of them, in the order in which they are counted."""


class Gatherer:
    """Keeps the answers to a prompt until the last of them has ended."""

    def __init__(self) -> None:
        self._ended: Dict[int, Dict[int, Tuple[Answer, Usage]]] = {}

    def take(self, piece: Piece) -> Optional[Ended]:
        """More of an answer; the prompt's answers when this was the last that was missing."""
        if piece.usage is None:
            return None
        mine = self._ended.setdefault(piece.index, {})
        mine[piece.choice] = (piece.answer, piece.usage)
        if len(mine) < piece.answer.siblings:
            return None
        del self._ended[piece.index]
        return [mine[choice] for choice in sorted(mine)]


class Text:
    """Prompts and continuations, streamed. One prompt's text is never mixed with another's: the others wait their turn.

    Args:
        out: where to; on a terminal nothing in a text is obeyed.
        heads: printed before each answer, the prompt when it is to be shown.
        answers: how many answers each prompt gets.
    """

    def __init__(self, out: IO[str], heads: Sequence[str], answers: Sequence[int]):
        self._out = out
        self._on_terminal = out.isatty()
        self._first = [sum(answers[:index]) for index in range(len(answers))]
        self._waiting = [head for head, count in zip(heads, answers) for _ in range(count)]
        self._finished = [False] * len(self._waiting)
        self._turn = 0
        self._within_line = False
        self._write()

    def take(self, piece: Piece) -> None:
        """More of an answer."""
        place = self._first[piece.index] + piece.choice
        self._waiting[place] += piece.text
        if piece.usage is not None:
            self._waiting[place] += "\n"
            self._finished[place] = True
        if place == self._turn:
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

    def __init__(self, entries: Sequence[PromptEntry], write: Callable[[int, Dict[str, Any]], None], in_order: bool):
        self._entries, self._write, self._in_order = entries, write, in_order
        self._gatherer = Gatherer()
        self._ready: Dict[int, Dict[str, Any]] = {}
        self._turn = 0

    def take(self, piece: Piece) -> None:
        """More of an answer; nothing is written before it has ended."""
        ended = self._gatherer.take(piece)
        if ended is None or any(answer.finish_reason == CANCELLED for answer, _ in ended):
            return
        self._ready[piece.index] = record(self._entries[piece.index], ended)
        for index in [piece.index] if not self._in_order else range(self._turn, len(self._entries)):
            if index not in self._ready:
                break
            self._write(self._entries[index].index, self._ready.pop(index))
            self._turn = index + 1

    def close(self) -> None:
        """No more comes."""


def record(entry: PromptEntry, ended: Ended) -> Dict[str, Any]:
    """A prompt's finished answers as JSON has them; of several, the first is where a single one would be. Times in
    seconds."""
    (answer, usage), *others = ended
    made: Dict[str, Any] = {"index": entry.index}
    if entry.name is not None:
        made["id"] = entry.name
    made["prompt" if isinstance(entry.source, str) else "messages"] = entry.source
    made.update({"text": answer.text, "token_ids": answer.token_ids, "prompt_tokens": usage.prompt_tokens,
                 **_end(answer), "prefill_s": round(usage.prefill_s, 6), "decode_s": round(usage.decode_s, 6)})
    if usage.guessed_tokens is not None:
        made.update(decode_steps=usage.decode_steps, guessed_tokens=usage.guessed_tokens,
                    accepted_tokens=usage.accepted_tokens, tokens_per_step=_tokens_per_step([usage]))
    if usage.cached_tokens:
        made["cached_tokens"] = usage.cached_tokens
    if answer.prompt_logprobs:
        made["prompt_logprobs"] = answer.prompt_logprobs
    if answer.logprobs:
        made["logprobs"] = answer.logprobs
    if others:
        made["answers"] = [{"text": each.text, "token_ids": each.token_ids, **_end(each),
                            **({"logprobs": each.logprobs} if each.logprobs else {})} for each, _ in ended]
    return made


def _end(answer: Answer) -> Dict[str, Any]:
    return {"generated_tokens": len(answer.token_ids), "finish_reason": answer.finish_reason}


def write_line(out: IO[str], value: Dict[str, Any]) -> None:
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
    return f"{line}{guesses(usages)}, {total_s:.2f} s in all"


def guesses(usages: Sequence[Usage]) -> str:
    """What guessing was worth, as the end of a sentence; empty where nothing was guessed."""
    guessed = [usage for usage in usages if usage.guessed_tokens is not None]
    rate = _tokens_per_step(guessed)
    if rate is None:
        return ""
    right, checked = (sum(getattr(usage, name) or 0 for usage in guessed)
                      for name in ("accepted_tokens", "guessed_tokens"))
    return f", {rate:.2f} tokens a step ({right} of {checked} guesses right)"


def _tokens_per_step(usages: Sequence[Usage]) -> Optional[float]:
    """Tokens that a sequence's decode step made on average; None without any step."""
    steps = sum(usage.decode_steps for usage in usages)
    return round(sum(max(usage.generated_tokens - 1, 0) for usage in usages) / steps, 4) if steps else None
