"""What goes into the engine and what comes out: requests, the limits they have to keep, steps and what they took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import FrozenSet, List, NamedTuple, Optional, Tuple

from ..errors import UserError
from .sampling import Constraint, SamplingParams

STOP, LENGTH, CANCELLED, FAILED = "stop", "length", "cancelled", "failed"
"""Why a request ended: a stop token (or nothing else was allowed), a limit, someone's wish, logits not finite."""


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        prompt: token ids, at least one.
        max_length: longest result in tokens, prompt included.
        max_new_tokens: most tokens to generate, None for no limit of its own; whichever limit comes first ends it. 0,
            to generate nothing, only with prompt_logprobs.
        stop_ids: tokens that end the text; the one that did is reported like any other.
        params: how tokens are chosen.
        logprobs: report the log probabilities of this many most probable tokens at each step; 0 for none.
        prompt_logprobs: report those of the prompt's own tokens, with this many most probable ones at each place; None
            for none.
        constraint: makes the mask of allowed tokens, on rank 0; None allows all.
        speculate: its next tokens may be guessed, where the engine guesses at all; none of them depends on it.
        label: what messages call it.
    """

    prompt: Tuple[int, ...]
    max_length: int
    max_new_tokens: Optional[int] = None
    stop_ids: FrozenSet[int] = frozenset()
    params: SamplingParams = SamplingParams()
    logprobs: int = 0
    prompt_logprobs: Optional[int] = None
    constraint: Optional[Constraint] = None
    speculate: bool = True
    label: str = "the prompt"

    @property
    def limit(self) -> int:
        """Tokens of the longest result these limits allow, prompt included."""
        if self.max_new_tokens is None:
            return self.max_length
        return min(self.max_length, len(self.prompt) + self.max_new_tokens)


@dataclass(frozen=True)
class Limits:
    """What fits: known before a network is loaded.

    Attributes:
        vocab_size: V, the model's vocabulary.
        seq_length: longest sequence the network can place (rows of its RoPE table).
        num_blocks, block_size: the KV cache's blocks and the tokens in one.
    """

    vocab_size: int
    seq_length: int
    num_blocks: int
    block_size: int

    def check(self, request: Request) -> None:
        """Raises a UserError with the numbers when the request can never run."""
        length, label = len(request.prompt), request.label
        if not length:
            raise UserError(f"{label} is empty", fix="Give at least one token of text.")
        highest, lowest = max(request.prompt), min(request.prompt)
        if highest >= self.vocab_size or lowest < 0:
            raise UserError(f"{label} has token id {lowest if lowest < 0 else highest}, the model's vocabulary ends at "
                            f"{self.vocab_size - 1}", fix="Use the tokenizer files of this checkpoint.")
        for token in request.params.bias_ids:
            if not 0 <= token < self.vocab_size:
                raise UserError(f"{label} has a logit_bias for token id {token}, the model's vocabulary ends at "
                                f"{self.vocab_size - 1}", fix="Use ids of this checkpoint.")
        if length > self.seq_length:
            raise UserError(f"{label} has {length} tokens, seq_length is {self.seq_length}",
                            fix="Shorten it or raise model.model_config.seq_length.")
        generates_nothing = request.prompt_logprobs is not None and request.max_new_tokens == 0
        if length >= request.max_length and not (generates_nothing and length == request.max_length):
            raise UserError(f"{label} has {length} tokens and the limit on prompt and answer together is "
                            f"{request.max_length}: nothing can be generated",
                            fix=f"Raise --predict_length above {length}.")
        if request.limit > self.seq_length:
            raise UserError(f"{label} may grow to {request.limit} tokens, seq_length is {self.seq_length}",
                            fix="Lower --predict_length (max_decode_length) or raise model.model_config.seq_length.")
        needed = -(-request.limit // self.block_size)
        if needed > self.num_blocks:
            raise UserError(f"{label} with its answer may take {request.limit} tokens = {needed} blocks of "
                            f"{self.block_size}, "
                            f"the KV cache has {self.num_blocks} blocks ({self.num_blocks * self.block_size} tokens)",
                            fix=f"Raise model.model_config.num_blocks to {needed} or lower --predict_length.")


class LogProbs(NamedTuple):
    """Natural-log probabilities at one place, before penalties, temperature, top_k and top_p: of the token that is
    there, and of the most probable ones as (id, log probability)."""

    chosen: float
    top: Tuple[Tuple[int, float], ...]


class Usage(NamedTuple):
    """What a finished request took. Times are those of the calls it was part of, shared with the rest of its batch.

    Attributes:
        prompt_tokens: tokens of the prompt.
        cached_tokens: those of them whose keys and values were in the cache from an earlier request.
        generated_tokens: tokens chosen.
        prefill_s, decode_s: seconds.
        decode_steps: calls that it decoded in; without guesses each makes one token.
        guessed_tokens, accepted_tokens: guesses that were checked, and those of them that were right; None where
            nothing is guessed.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    prefill_s: float
    decode_s: float
    decode_steps: int = 0
    guessed_tokens: Optional[int] = None
    accepted_tokens: Optional[int] = None


class Step(NamedTuple):
    """One token of one request, or its end.

    Attributes:
        request: which one.
        token: its new token; None when there is none: it was cancelled, it failed, or nothing was to be generated.
        finish_reason: 'stop', 'length', 'cancelled' or 'failed' with the last step, None before.
        usage: with the last step.
        logprobs: when asked for (on rank 0).
        prompt_logprobs: when asked for, with the first step (on rank 0): one for each token of the prompt but the
            first.
        error: with 'failed'.
    """

    request: int
    token: Optional[int]
    finish_reason: Optional[str] = None
    usage: Optional[Usage] = None
    logprobs: Optional[LogProbs] = None
    prompt_logprobs: Optional[List[LogProbs]] = None
    error: Optional[UserError] = None
