"""Answers in OpenAI's shapes: whole, or as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from ..generation.request import LENGTH, Usage
from .protocol import Call
from .tool_calls import ToolCall, ToolCalls

Entry = Dict[str, Any]
"""A token's log probabilities as `session.Answer` has them: token_id, token, logprob, top."""


@dataclass
class Choice:
    """One answer as it grows.

    Attributes:
        index: its number among the request's.
        text, entries: what has come so far, and its tokens' log probabilities.
        tool_calls: calls that were found in it.
        finish_reason: set with the last piece.
        usage: with the last piece.
    """

    index: int
    text: str = ""
    entries: List[Entry] = field(default_factory=list)
    tool_calls: List[ToolCall] = field(default_factory=list)
    finish_reason: Optional[str] = None
    usage: Optional[Usage] = None


class Answers:
    """The answer to one request.

    Args:
        call: the request.
        model: what the model is called.
        token_bytes: UTF-8 bytes of a token.
        prompt_text: text of a prompt's ids, for `echo`.
        choices: answers in all, prompts times `n`.
    """

    def __init__(self, call: Call, model: str, token_bytes: Callable[[int], bytes], prompt_text: Callable[[int], str]):
        self._call, self._token_bytes = call, token_bytes
        self.id = f"{'chatcmpl' if call.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._common = {"id": self.id, "object": "chat.completion" if call.chat else "text_completion",
                        "created": int(time.time()), "model": model}
        self.choices = [Choice(index) for index in range(len(call.prompts) * call.choices)]
        self._prompt_text = prompt_text
        self._calls = [ToolCalls() if call.tools else None for _ in self.choices]

    def prompt_of(self, index: int) -> int:
        """Number of the prompt that choice `index` continues."""
        return index // self._call.choices

    def first_chunks(self) -> List[Dict[str, Any]]:
        """What a stream begins with, before anything was generated."""
        if self._call.chat:
            return [self._chunk(choice.index, {"role": "assistant", "content": ""}) for choice in self.choices]
        return []

    def take(self, index: int, text: str, entries: Sequence[Entry], finish_reason: Optional[str],
             usage: Optional[Usage], prompt_entries: Sequence[Optional[Entry]] = ()) -> List[Dict[str, Any]]:
        """More of choice `index`; returns the chunks of a stream that say so."""
        choice, calls = self.choices[index], self._calls[index]
        if self._call.echo and not choice.text and not choice.entries:
            text = self._prompt_text(self.prompt_of(index)) + text
            entries = [*prompt_entries, *entries]  # type: ignore[list-item]
        choice.entries += entries
        found: List[ToolCall] = []
        if calls is not None:
            text, found = calls.feed(text, finish_reason is not None)
        start = len(choice.text)
        choice.text += text
        choice.tool_calls += found
        chunks = []
        if found:
            first = len(choice.tool_calls) - len(found)
            chunks.append(self._chunk(
                index, {"tool_calls": [{"index": first + i, **made.openai()} for i, made in enumerate(found)]}))
        if text or entries and not found:
            chunks.append(self._chunk(index, {"content": text}, text=text, logprobs=self._logprobs(entries, start)))
        if finish_reason is not None:
            choice.usage = usage
            choice.finish_reason = "tool_calls" if choice.tool_calls and finish_reason != LENGTH else finish_reason
            chunks.append(self._chunk(index, {}, finish_reason=choice.finish_reason))
        return chunks

    def usage_chunk(self) -> Dict[str, Any]:
        """The last chunk of a stream that was asked for its usage."""
        return {**self._head(chunk=True), "choices": [], "usage": self.usage()}

    def whole(self) -> Dict[str, Any]:
        """The answer in one piece."""
        make = self._message_choice if self._call.chat else self._text_choice
        return {**self._head(), "choices": [make(choice) for choice in self.choices], "usage": self.usage()}

    def usage(self) -> Dict[str, Any]:
        """Tokens of the whole request; a prompt counts once however many answers it gets."""
        finished = [choice for choice in self.choices if choice.usage is not None]
        firsts = {self.prompt_of(choice.index): choice.usage for choice in reversed(finished)}
        prompt = sum(usage.prompt_tokens for usage in firsts.values() if usage is not None)
        cached = sum(usage.cached_tokens for usage in firsts.values() if usage is not None)
        made = sum(choice.usage.generated_tokens for choice in finished if choice.usage is not None)
        counted: Dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
                                   "prompt_tokens_details": {"cached_tokens": cached}}
        guessed = [choice.usage for choice in finished
                   if choice.usage is not None and choice.usage.guessed_tokens is not None]
        if guessed:  # under the names that OpenAI has for predicted outputs
            right = sum(usage.accepted_tokens or 0 for usage in guessed)
            wrong = sum(usage.guessed_tokens or 0 for usage in guessed) - right
            counted["completion_tokens_details"] = {"accepted_prediction_tokens": right,
                                                    "rejected_prediction_tokens": wrong}
        return counted

    # --- shapes

    def _head(self, chunk: bool = False) -> Dict[str, Any]:
        if chunk and self._call.chat:
            return {**self._common, "object": "chat.completion.chunk"}
        return dict(self._common)

    def _chunk(self, index: int, delta: Dict[str, Any], text: str = "", logprobs: Any = None,
               finish_reason: Optional[str] = None) -> Dict[str, Any]:
        content = {"delta": delta} if self._call.chat else {"text": text}
        made = {**self._head(chunk=True), "choices": [{"index": index, **content, "logprobs": logprobs,
                                                       "finish_reason": finish_reason}]}
        if self._call.include_usage:
            made["usage"] = None
        return made

    def _message_choice(self, choice: Choice) -> Dict[str, Any]:
        message: Dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.tool_calls:
            message.update(content=choice.text.strip() or None,
                           tool_calls=[call.openai() for call in choice.tool_calls])
        return {"index": choice.index, "message": message, "logprobs": self._logprobs(choice.entries, 0),
                "finish_reason": choice.finish_reason}

    def _text_choice(self, choice: Choice) -> Dict[str, Any]:
        return {"index": choice.index, "text": choice.text, "logprobs": self._logprobs(choice.entries, 0),
                "finish_reason": choice.finish_reason}

    def _logprobs(self, entries: Sequence[Optional[Entry]], offset: int) -> Optional[Dict[str, Any]]:
        wanted = self._call.logprobs
        if wanted is None:
            return None
        if self._call.chat:
            return {"content": [self._chat_entry(entry, wanted) for entry in entries if entry is not None],
                    "refusal": None}
        tokens, offsets = [], []
        for entry in entries:
            tokens.append("" if entry is None else entry["token"])
            offsets.append(offset)
            offset += len(tokens[-1])
        return {"tokens": tokens, "text_offset": offsets,
                "token_logprobs": [None if entry is None else entry.get("logprob") for entry in entries],
                "top_logprobs": [None if entry is None or entry.get("logprob") is None else
                                 {top["token"]: top["logprob"] for top in reversed(self._top(entry, wanted))}
                                 for entry in entries] if wanted else None}

    @staticmethod
    def _top(entry: Entry, wanted: int) -> List[Entry]:
        """The likeliest tokens; the chosen one is always among a completion's, as OpenAI has it."""
        top = list(entry["top"][:wanted])
        return top if any(other["token_id"] == entry["token_id"] for other in top) else [*top, entry]

    def _chat_entry(self, entry: Entry, wanted: int) -> Dict[str, Any]:
        return {**self._with_bytes(entry), "top_logprobs": [self._with_bytes(top) for top in entry["top"][:wanted]]}

    def _with_bytes(self, entry: Entry) -> Dict[str, Any]:
        return {"token": entry["token"], "logprob": entry["logprob"],
                "bytes": list(self._token_bytes(entry["token_id"]))}


def pairs(call: Call) -> List[Tuple[int, int]]:
    """(prompt, copy) of each choice, in order."""
    return [(prompt, copy) for prompt in range(len(call.prompts)) for copy in range(call.choices)]
