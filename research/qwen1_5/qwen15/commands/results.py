"""What is printed of answers: text as it streams, JSON objects, the timing line."""

import json
from typing import IO, Any, Dict, List, Optional, Sequence

from ..generation.request import Usage
from ..generation.session import Answer, Piece


class Text:
    """Prompts and continuations, streamed. One prompt's text is never mixed with another's: the others wait their turn.

    Args:
        out: where to; None prints nothing (the ranks that are not the first).
        heads: printed before each answer, the prompt when it is to be shown.
    """

    def __init__(self, out: Optional[IO[str]], heads: Sequence[str]):
        self._out = out
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
        if self._within_line and self._out is not None:
            self._out.write("\n")
            self._out.flush()
            self._within_line = False

    def _write(self) -> None:
        if self._turn < len(self._waiting) and self._waiting[self._turn]:
            if self._out is not None:
                self._out.write(printable(self._waiting[self._turn]))
                self._out.flush()
            self._within_line = not self._waiting[self._turn].endswith("\n")
            self._waiting[self._turn] = ""


class JsonLines:
    """One JSON object per prompt, in the order of the prompts; `text` and `token_ids` are the continuation's."""

    def __init__(self, out: Optional[IO[str]], prompts: Sequence[Any]):
        self._out, self._prompts = out, prompts
        self._ready: Dict[int, str] = {}
        self._turn = 0

    def close(self) -> None:
        """No more comes."""

    def take(self, piece: Piece) -> None:
        """More of an answer; nothing is printed before it has ended."""
        if piece.usage is None:
            return
        self._ready[piece.index] = json_line(record(self._prompts[piece.index], piece.answer, piece.usage))
        while self._turn in self._ready:
            line = self._ready.pop(self._turn)
            if self._out is not None:
                self._out.write(line + "\n")
                self._out.flush()
            self._turn += 1


def record(prompt: Any, answer: Answer, usage: Usage) -> Dict[str, Any]:
    """A finished answer as JSON has it; `prompt` is the text, or the messages of a conversation."""
    made: Dict[str, Any] = {"prompt" if isinstance(prompt, str) else "messages": prompt}
    made.update({"text": answer.text, "token_ids": answer.token_ids, "prompt_tokens": usage.prompt_tokens,
                 "generated_tokens": len(answer.token_ids), "finish_reason": answer.finish_reason,
                 "prefill_s": round(usage.prefill_s, 6), "decode_s": round(usage.decode_s, 6)})
    if answer.logprobs:
        made["logprobs"] = answer.logprobs
    return made


def json_line(value: Any) -> str:
    """`value` as JSON on one line, characters as they are where they have a UTF-8 form.

    Separators that some readers take for line ends (U+0085, U+2028, U+2029) are escaped; so is everything when there is a lone
    surrogate, which has no UTF-8 form.
    """
    line = json.dumps(value, ensure_ascii=False)
    for separator in "\x85\u2028\u2029":
        line = line.replace(separator, f"\\u{ord(separator):04x}")
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value)
    return line


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
