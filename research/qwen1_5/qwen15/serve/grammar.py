"""Answers that match a grammar: JSON schemas and tool calls, by llguidance's masks over the vocabulary."""

from __future__ import annotations

import json
from typing import Any, List, Mapping, Optional, Sequence

import llguidance
import llguidance.numpy
import numpy as np

from .protocol import GrammarMaker
from .tool_calls import CLOSE, OPEN

_JSON: Any = {"whitespace_pattern": r"[ \n\t]{0,20}"}
"""JSON may be laid out, but a small model that has lost its way cannot write blanks for ever."""


class _Vocabulary:
    """A tokenizer as llguidance reads one."""

    def __init__(self, tokenizer: Any, size: int, eos_token_id: int):
        self.eos_token_id = eos_token_id
        self.bos_token_id = None
        self.special_token_ids = sorted(tokenizer.control_token_ids)
        known = len(tokenizer)
        self.tokens = [tokenizer.token_bytes(token) if token < known else b"" for token in range(size)]
        self._tokenizer = tokenizer

    def __call__(self, text: Any) -> List[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return self._tokenizer.encode(text, control_tokens=False)


class Grammars(GrammarMaker):
    """Makes grammars, checked, and the constraints that keep an answer to one.

    Args:
        tokenizer: the checkpoint's.
        vocab_size: V, the columns of the logits; ids beyond the tokenizer's are never allowed.
        stop_ids: tokens that end an answer; the first is what a finished grammar asks for.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, stop_ids: Sequence[int]):
        self._vocab_size = vocab_size
        wrapped = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, stop_ids[0]))
        self._tokenizer = llguidance.LLTokenizer(wrapped, n_vocab=vocab_size, eos_token=list(stop_ids))

    def json(self, schema: Optional[Mapping[str, Any]]) -> str:
        return self._checked(llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema or {"type": "object"}),
                                                                           _JSON))

    def tool_calls(self, functions: Sequence[Mapping[str, Any]], several: bool) -> str:
        choices = [{"type": "object", "additionalProperties": False, "required": ["name", "arguments"], "properties": {
            "name": {"const": function["name"]}, "arguments": function.get("parameters") or {"type": "object"}}}
            for function in functions]
        schema = json.dumps({**(choices[0] if len(choices) == 1 else {"anyOf": choices}), "x-guidance": _JSON})
        call = f'"{OPEN}\\n" json "\\n{CLOSE}"'
        start = f'{call} ("\\n" {call})*' if several else call
        return self._checked(llguidance.LLMatcher.grammar_from_lark(f"start: {start}\njson: %json {schema}\n"))

    def constraint(self, grammar: str) -> Constraint:
        """What keeps one answer to `grammar`."""
        return Constraint(llguidance.LLMatcher(self._tokenizer, grammar), self._vocab_size)

    def _checked(self, grammar: str) -> str:
        error = llguidance.LLMatcher.validate_grammar(grammar, self._tokenizer)
        if error:
            raise ValueError(" ".join(error.split())[:300])
        return grammar


class Constraint:
    """The state of one answer within its grammar; what the engine calls a token mask.

    Attributes:
        failure: why the grammar can be followed no further, None while it can.
    """

    def __init__(self, matcher: Any, vocab_size: int):
        self._matcher = matcher
        self._bits = llguidance.numpy.allocate_token_bitmask(1, vocab_size)
        self.failure: Optional[str] = None

    def allowed(self) -> np.ndarray:
        """(ceil(V / 32),) int32, a bit for each token that may come next, lowest first; at the grammar's end those
        that stop."""
        if not self._matcher.is_error():
            llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits)
        if self._matcher.is_error():  # beyond llguidance's limits: nothing is allowed, and the answer ends here
            self.failure = " ".join(self._matcher.get_error().split())[:300]
            self._bits[:] = 0
        return self._bits[0]

    def accept(self, token: int) -> None:
        """`token` was chosen."""
        self._matcher.consume_token(token)
