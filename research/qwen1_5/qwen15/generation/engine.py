"""Prefill, decode, generate: token ids in, steps out, over a paged KV cache with continuous batching. Knows no text."""

import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Deque, FrozenSet, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from .. import interrupts
from ..errors import EXIT_FAILED, UserError
from ..network.base import Network
from . import sampling
from .blocks import BlockPool, BlockTable, table_array
from .sampling import NonFiniteLogits, Sampler, SamplingParams, Selection

PREFILL_CHUNK_TOKENS = 2048
"""Most tokens in one prefill call: bounds the activations whatever the prompts' lengths."""

STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"


class KeptCache:
    """A conversation's part of the KV cache, kept between requests; the next one prefills only what is new.

    Attributes:
        ids: the tokens whose keys and values are in the cache.
    """

    def __init__(self, engine: "Engine"):
        self.table = BlockTable(engine.pool)
        self.ids: List[int] = []

    def release(self) -> None:
        """Give the blocks back and forget the conversation."""
        self.table.release()
        self.ids = []


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

    def check(self, request: "Request") -> None:
        """Raises a UserError with the numbers when the request can never run."""
        length, label = len(request.prompt), request.label
        if not length:
            raise UserError(f"{label} is empty", fix="Give at least one token of text.")
        highest = max(request.prompt)
        if highest >= self.vocab_size or min(request.prompt) < 0:
            raise UserError(f"{label} has token id {highest}, the model's vocabulary ends at {self.vocab_size - 1}",
                            fix="Use the tokenizer files of this checkpoint.")
        if length > self.seq_length:
            raise UserError(f"{label} has {length} tokens, seq_length is {self.seq_length}",
                            fix="Shorten it or raise model.model_config.seq_length.")
        if length >= request.max_length:
            raise UserError(f"{label} has {length} tokens and the limit on prompt and answer together is {request.max_length}: "
                            f"nothing can be generated", fix=f"Raise --predict_length above {length}.")
        if request.limit > self.seq_length:
            raise UserError(f"{label} may grow to {request.limit} tokens, seq_length is {self.seq_length}",
                            fix="Lower --predict_length (max_decode_length) or raise model.model_config.seq_length.")
        needed = -(-request.limit // self.block_size)
        if needed > self.num_blocks:
            raise UserError(f"{label} with its answer may take {request.limit} tokens = {needed} blocks of {self.block_size}, "
                            f"the KV cache has {self.num_blocks} blocks ({self.num_blocks * self.block_size} tokens)",
                            fix=f"Raise model.model_config.num_blocks to {needed} or lower --predict_length.")


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        prompt: token ids, at least one.
        max_length: longest result in tokens, prompt included.
        max_new_tokens: most tokens to generate, None for no limit of its own; whichever limit comes first ends it.
        stop_ids: tokens that end the text; the one that did is reported like any other.
        params: how tokens are chosen.
        logprobs: report the log probabilities of this many most probable tokens at each step; 0 for none.
        kept: reuse and extend this conversation's cache.
        label: what messages call it.
    """

    prompt: Tuple[int, ...]
    max_length: int
    max_new_tokens: Optional[int] = None
    stop_ids: FrozenSet[int] = frozenset()
    params: SamplingParams = SamplingParams()
    logprobs: int = 0
    kept: Optional[KeptCache] = None
    label: str = "the prompt"

    @property
    def limit(self) -> int:
        """Tokens of the longest result these limits allow, prompt included."""
        if self.max_new_tokens is None:
            return self.max_length
        return min(self.max_length, len(self.prompt) + self.max_new_tokens)


@dataclass(frozen=True)
class LogProbs:
    """Natural-log probabilities at one step, before penalty, temperature, top_k and top_p: of the token chosen, and of
    the most probable ones as (id, log probability)."""

    chosen: float
    top: Tuple[Tuple[int, float], ...]


@dataclass(frozen=True)
class Usage:
    """What a finished request took. Times are those of the calls it was part of, shared with the rest of its batch."""

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    prefill_s: float
    decode_s: float


@dataclass(frozen=True)
class Step:
    """One token of one request.

    Attributes:
        request: index of the request.
        token: its new token, None for a request that was cancelled.
        finish_reason: 'stop', 'length' or 'cancelled' with the last step, None before.
        usage: with the last step.
        logprobs: when asked for (on rank 0).
    """

    request: int
    token: Optional[int]
    finish_reason: Optional[str] = None
    usage: Optional[Usage] = None
    logprobs: Optional[LogProbs] = None


@dataclass
class _Sequence:
    """A request while it runs: ids are prompt and generated tokens, the first `cached` of them are in the KV cache."""

    index: int
    request: Request
    sampler: Sampler
    table: BlockTable
    ids: List[int]
    cached: int = 0
    reused: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    done: bool = field(default=False)

    @property
    def generated(self) -> int:
        return len(self.ids) - len(self.request.prompt)


class Engine:
    """Runs requests on a network.

    Args:
        network: see `network.Network`.
        limits: what fits.
        max_batch: most sequences that run at once; None leaves it to the cache.
        selection: the searches over the vocabulary.
    """

    def __init__(self, network: Network, limits: Limits, max_batch: Optional[int] = None,
                 selection: Selection = sampling.PLAIN):
        self.network = network
        self.limits = limits
        self.pool = BlockPool(limits.num_blocks, limits.block_size)
        self.max_batch = max_batch
        self.selection = selection
        self._cancelled: set = set()
        self._interrupt_wanted = False
        self._interrupted = False

    def interrupt(self) -> None:
        """End the running `generate`: requests that run say 'cancelled' with their last step, waiting ones never start.

        For rank 0, from a signal handler too; the other ranks learn of it with the next tokens.
        """
        self._interrupt_wanted = True

    def cancel(self, request: int) -> None:
        """End this request of the running `generate` before its next token; its last step says 'cancelled'."""
        self._cancelled.add(request)

    def generate(self, requests: Sequence[Request]) -> Iterator[Step]:
        """Run the requests, as many at once as the KV cache holds, and yield every token as it comes.

        A request starts when the blocks for its longest result are free, in the order given; those of one that has ended
        go to the next. With float32 weights and cache a request's tokens do not depend on what it is batched with.

        Raises:
            UserError: a request that can never run (before any work), or logits that are not finite.
        """
        for request in requests:
            self.limits.check(request)
        self._cancelled = set()
        self._interrupt_wanted = self._interrupted = False
        waiting: Deque[Tuple[int, Request]] = deque(enumerate(requests))
        running: List[_Sequence] = []
        try:
            while (waiting and not self._interrupted) or running:
                started = self._start(waiting, running)
                running.extend(started)
                if started:
                    yield from self._prefill(started)
                for sequence in running:
                    if (self._interrupted or sequence.index in self._cancelled) and not sequence.done:
                        sequence.done = True
                        yield Step(sequence.index, None, CANCELLED, self._usage(sequence))
                running = self._drop_done(running)
                if running:
                    yield from self._decode(running)
                    running = self._drop_done(running)
        finally:
            for sequence in running:
                self._let_go(sequence)

    def _start(self, waiting: Deque[Tuple[int, Request]], running: List[_Sequence]) -> List[_Sequence]:
        """Take requests from the queue while there is room for them."""
        started: List[_Sequence] = []
        while waiting and not self._interrupted and (self.max_batch is None or len(running) + len(started) < self.max_batch):
            index, request = waiting[0]
            kept = request.kept
            table = BlockTable(self.pool) if kept is None else kept.table
            if self.pool.blocks_for(request.limit) - len(table.blocks) > self.pool.free_blocks:
                if not running and not started:
                    raise UserError(f"{request.label} needs {self.pool.blocks_for(request.limit)} blocks of the KV cache and "
                                    f"kept conversations leave {self.pool.free_blocks + len(table.blocks)}",
                                    fix="End a conversation or raise model.model_config.num_blocks.")
                break
            waiting.popleft()
            table.reserve(request.limit)
            sequence = _Sequence(index, request, Sampler(request.params, request.prompt, self.selection), table,
                                 list(request.prompt))
            if kept is not None:
                sequence.cached = sequence.reused = self._shared_prefix(kept.ids, request.prompt)
            started.append(sequence)
        return started

    def _shared_prefix(self, cached: Sequence[int], prompt: Sequence[int]) -> int:
        """Tokens of the prompt that are in the cache already; the last one always runs, for its logits."""
        if not self.network.supports_cached_prefill:
            return 0
        shared = 0
        while shared < min(len(cached), len(prompt) - 1) and cached[shared] == prompt[shared]:
            shared += 1
        return shared

    def _prefill(self, sequences: List[_Sequence]) -> Iterator[Step]:
        """Bring the prompts into the cache, in calls of bounded size, and yield each one's first token."""
        pending = deque(sequences)
        while pending and not self._interrupted:
            batch, room = [], PREFILL_CHUNK_TOKENS
            while pending and room > 0:
                sequence = pending[0]
                missing = len(sequence.ids) - sequence.cached
                take = min(missing, room) if self.network.supports_cached_prefill else missing
                batch.append((sequence, sequence.cached + take))
                room -= take
                if take < missing:
                    break
                pending.popleft()
            start_s = time.perf_counter()
            with interrupts.held():
                logits = self.network.prefill(
                    np.concatenate([np.asarray(s.ids[s.cached:stop], np.int32) for s, stop in batch]),
                    np.asarray([stop - s.cached for s, stop in batch], np.int32),
                    np.asarray([stop for _, stop in batch], np.int32),
                    table_array([s.table for s, _ in batch], [stop for _, stop in batch], self.pool.block_size),
                    np.concatenate([s.table.slots(s.cached, stop) for s, stop in batch]))
            for sequence, stop in batch:
                sequence.cached = stop
            whole = [row for row, (s, stop) in enumerate(batch) if stop == len(s.ids)]
            steps = self._choose([batch[row][0] for row in whole], logits, whole)
            spent_s = time.perf_counter() - start_s
            for sequence, _ in batch:
                sequence.prefill_s += spent_s
            yield from self._finish(steps)

    def _decode(self, sequences: List[_Sequence]) -> Iterator[Step]:
        """One more token for every running sequence."""
        start_s = time.perf_counter()
        lengths = [len(s.ids) for s in sequences]
        with interrupts.held():
            logits = self.network.decode(
                np.asarray([s.ids[-1] for s in sequences], np.int32), np.asarray(lengths, np.int32),
                table_array([s.table for s in sequences], lengths, self.pool.block_size),
                np.asarray([s.table.slot(length - 1) for s, length in zip(sequences, lengths)], np.int32))
        for sequence in sequences:
            sequence.cached = len(sequence.ids)
        steps = self._choose(sequences, logits, range(len(sequences)))
        spent_s = time.perf_counter() - start_s
        for sequence in sequences:
            sequence.decode_s += spent_s
        yield from self._finish(steps)

    def _choose(self, sequences: List[_Sequence], logits: np.ndarray, rows: Sequence[int]
                ) -> List[Tuple[_Sequence, int, Optional[LogProbs]]]:
        """The next token of each sequence from its row of logits: chosen on rank 0, the same on every rank."""
        ids = np.zeros(len(sequences) + 1, np.int32)
        ids[-1] = self._interrupt_wanted
        logprobs: List[Optional[LogProbs]] = [None] * len(sequences)
        if self.network.rank == 0 and sequences:
            plain = [i for i, s in enumerate(sequences) if s.sampler.is_plain_greedy]
            try:
                if len(plain) == len(logits):
                    ids[:-1] = self.selection.argmax(logits)
                elif plain:
                    ids[plain] = self.selection.argmax(np.ascontiguousarray(logits[[rows[i] for i in plain]]))
                for i, sequence in enumerate(sequences):
                    if not sequence.sampler.is_plain_greedy:
                        ids[i] = sequence.sampler.choose(logits[rows[i]])
                    if sequence.request.logprobs:
                        logprobs[i] = self._logprobs(logits[rows[i]], int(ids[i]), sequence.request.logprobs)
            except NonFiniteLogits:
                ids[:-1] = -1  # every rank has to learn of it, or the others would wait for a token for ever
        with interrupts.held() if self.network.ranks > 1 else nullcontext():
            *ids, interrupted = self.network.agree(ids).tolist()
        self._interrupted = bool(interrupted)
        if ids and ids[0] < 0:
            raise self._non_finite(sequences)
        return list(zip(sequences, ids, logprobs))

    def _logprobs(self, row: np.ndarray, token: int, count: int) -> LogProbs:
        top_ids, top = sampling.most_probable(row, count, self.selection)
        chosen = float(sampling.log_probabilities(row, [token])[0])
        return LogProbs(chosen, tuple((int(i), float(value)) for i, value in zip(top_ids, top)))

    def _non_finite(self, sequences: List[_Sequence]) -> UserError:
        after = max(s.generated for s in sequences)
        weight = self.network.find_non_finite()
        if weight:
            return UserError(f"the logits are not finite (NaN or infinity) because weight {weight} is not",
                             fix="Convert or download the checkpoint again.", exit_code=EXIT_FAILED)
        return UserError(f"the logits are not finite (NaN or infinity) after {after} generated tokens, all weights are finite",
                         fix="Activations overflow: use compute_dtype and param_init_type bfloat16 or float32.",
                         exit_code=EXIT_FAILED)

    def _finish(self, steps: List[Tuple[_Sequence, int, Optional[LogProbs]]]) -> Iterator[Step]:
        """Append the chosen tokens and tell which sequences end with them."""
        for sequence, token, logprob in steps:
            sequence.ids.append(token)
            sequence.sampler.note(token)
            reason = None
            if token in sequence.request.stop_ids:
                reason = STOP
            elif len(sequence.ids) >= sequence.request.limit:
                reason = LENGTH
            sequence.done = reason is not None
            yield Step(sequence.index, token, reason, self._usage(sequence) if reason else None, logprob)

    def _usage(self, sequence: _Sequence) -> Usage:
        return Usage(len(sequence.request.prompt), sequence.reused, sequence.generated, sequence.prefill_s, sequence.decode_s)

    def _drop_done(self, running: List[_Sequence]) -> List[_Sequence]:
        for sequence in running:
            if sequence.done:
                self._let_go(sequence)
        return [sequence for sequence in running if not sequence.done]

    def _let_go(self, sequence: _Sequence) -> None:
        """Return a sequence's blocks, or leave them to the conversation they belong to."""
        if sequence.request.kept is None:
            sequence.table.release()
        else:
            sequence.request.kept.ids = sequence.ids[:sequence.cached]
