"""Token ids in, steps out, over a paged KV cache: requests come and go while it runs. Knows no text."""

from __future__ import annotations

import time
from collections import deque
from typing import Deque, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np

from .. import interrupts
from ..errors import EXIT_FAILED, UserError
from ..network.base import Network
from . import ranks, sampling
from .blocks import BlockPool, Part, decode_inputs, prefill_inputs
from .ranks import Add, Cancel, CancelAll, Command, Shared
from .request import CANCELLED, FAILED, LENGTH, STOP, Limits, LogProbs, Request, Step, Usage
from .sampling import NonFiniteLogits, NothingAllowed, Sampler, Selection
from .scheduler import Continuation, Scheduler
from .speculate import Speculation

_FAILED, _COMPLETE = -1, -2
"""What ranks are told in a token's place: the logits are not finite; the constraint allows nothing more."""
_NO_GUESS = -1


class _Choice(NamedTuple):
    """A request whose next tokens are chosen from the logits' rows `row`, `row + 1`, ..., one more than there are
    guesses."""

    continuation: Continuation
    row: int
    guesses: Tuple[int, ...] = ()


class StepStream:
    """The steps of the requests of one `Engine.generate`; `Step.request` counts them from 0. Leaving it ends them."""

    def __init__(self, engine: Engine, steps: Iterator[Step], numbers: List[int]):
        self._engine, self._steps, self._numbers = engine, steps, numbers

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        return next(self._steps)

    def cancel(self, index: int) -> None:
        """End one of the requests before its next token; its last step says 'cancelled'."""
        self._engine.cancel(self._numbers[index])

    def close(self) -> None:
        """End all of them without another step."""
        self._steps.close()  # type: ignore[attr-defined]


class Engine:
    """Runs requests on a network.

    `add` requests at any time, call `step` while there `has_work`, and it says what came of it. Over several ranks,
    rank 0 does that and the others `follow`; or every rank calls `generate` with the same requests.

    Args:
        network: see `network.base`.
        limits: what fits.
        max_batch: most sequences that run at once; None leaves it to the cache.
        selection: the searches over the vocabulary.
        prefix_cache: share full blocks of the KV cache between requests that begin alike.
        speculation: guesses tokens, so that one step can make several; what is generated does not depend on it.
    """

    def __init__(self, network: Network, limits: Limits, max_batch: Optional[int] = None,
                 selection: Selection = sampling.PLAIN, prefix_cache: bool = True,
                 speculation: Optional[Speculation] = None):
        self.network = network
        self.limits = limits
        self.selection = selection
        self.pool = BlockPool(limits.num_blocks, limits.block_size)
        self.scheduler = Scheduler(self.pool, max_batch, not network.supports_cached_prefill, prefix_cache)
        self.shared = Shared(network)
        self.speculation = speculation
        self.guessed_tokens = self.accepted_tokens = 0
        self._next_number = 0
        self._known: Dict[int, Continuation] = {}
        self._cancelled: Set[int] = set()
        self._untold: List[Command] = []
        self._interrupt_wanted = False
        self._boxes: Dict[int, Deque[Step]] = {}
        self._loose: List[Step] = []
        self._broken_weight: Optional[Tuple[Optional[str]]] = None

    # ---- what a caller does ----

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return not self.scheduler.is_empty or bool(self._untold) or bool(self._loose)

    def add(self, request: Request) -> int:
        """Queue a request (on rank 0) and return its number, which its steps bear.

        Raises:
            UserError: it can never run; with the numbers.
        """
        self.limits.check(request)
        number = self._next_number
        if self.network.ranks == 1:
            return self._enter(request)
        self._next_number += 1
        self._untold.append(Add(number, request))
        return number

    def cancel(self, number: int) -> None:
        """End a request before its next token; its last step says 'cancelled'. Nothing happens when it has ended.

        For rank 0; the others learn of it with the next tokens, and what they say of it themselves has no effect.
        """
        if self.network.rank == 0:
            self._untold.append(Cancel(number))

    def interrupt(self) -> None:
        """End everything that runs or waits. For rank 0, from a signal handler too."""
        self._interrupt_wanted = True

    def step(self) -> List[Step]:
        """One piece of prefill, then one more token for every request that is past its prompt; what came of it."""
        self._advance()
        steps, self._loose = self._loose, []
        return steps

    def generate(self, requests: Sequence[Request]) -> StepStream:
        """Run these requests and yield every token as it comes. With several ranks every one of them calls it alike.

        With float32 weights and cache a request's tokens do not depend on what it is batched with.

        Raises:
            UserError: with the first step: a request that can never run, before any work.
        """
        numbers: List[int] = []
        return StepStream(self, self._generate(requests, numbers), numbers)

    def follow(self) -> None:
        """What the ranks that are not the first do: the same steps, until rank 0 calls `close`."""
        while True:
            message = self.shared.hear()
            if not message:
                return
            self._obey(ranks.from_json(message))
            while not self.scheduler.is_empty:
                self._advance()
            self._loose.clear()

    def close(self) -> None:
        """On rank 0, when nothing runs: the ranks that `follow` may leave."""
        self.shared.tell(b"")

    # ---- the requests ----

    def _generate(self, requests: Sequence[Request], numbers: List[int]) -> Iterator[Step]:
        for request in requests:
            self.limits.check(request)
        box: Deque[Step] = deque()
        self._interrupt_wanted = False
        # Every rank adds the same requests, so none has to be told.
        numbers.extend(self._enter(request) for request in requests)
        for number in numbers:
            self._boxes[number] = box
        places = {number: index for index, number in enumerate(numbers)}
        unfinished = set(numbers)
        try:
            while unfinished:
                if not box:
                    self._advance()
                while box:
                    step = box.popleft()
                    if step.finish_reason is not None:
                        unfinished.discard(step.request)
                    yield step._replace(request=places[step.request])
        finally:
            for number in numbers:
                self._boxes.pop(number, None)
                self._leave(number)

    def _enter(self, request: Request) -> int:
        number, self._next_number = self._next_number, self._next_number + 1
        self._queue(number, request)
        return number

    def _queue(self, number: int, request: Request) -> None:
        mask = request.constraint() if request.constraint is not None and self.network.rank == 0 else None
        sampler = Sampler(request.params, request.prompt, self.selection, request.stop_ids, mask)
        self._known[number] = Continuation(number, request, sampler, self.pool)
        self.scheduler.add(self._known[number])

    def _leave(self, number: int) -> None:
        continuation = self._known.pop(number, None)
        if continuation is not None:
            self.scheduler.remove(continuation)
            self._cancelled.discard(number)
            if self.speculation is not None:
                self.speculation.forget(continuation)

    # ---- rank 0's word ----

    def _news(self) -> List[Command]:
        """What rank 0 has been asked since it was last looked at."""
        if self._interrupt_wanted:
            self._interrupt_wanted = False
            self._untold.append(CancelAll())
        news, self._untold = self._untold, []
        return news

    def _obey(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Add):
                self._next_number = max(self._next_number, command.number + 1)
                self._queue(command.number, command.request)
            elif isinstance(command, Cancel):
                if command.number in self._known:
                    self._cancelled.add(command.number)
            else:
                self._cancelled.update(self._known)

    def _agree(self, tokens: np.ndarray) -> np.ndarray:
        """Rank 0's tokens (N,) int32 on every rank, and its news obeyed: they cost a call more only when there are
        any."""
        if self.network.ranks == 1:
            self._obey(self._news())
            return tokens
        news = self._news() if self.network.rank == 0 else []
        message = ranks.to_json(news) if news else b""
        with interrupts.held():
            told = self.network.agree(np.append(tokens, len(message)).astype(np.int32))
            nbytes = int(told[-1])
            if nbytes:
                message = self.network.agree(ranks.padded(message or bytes(nbytes))).tobytes()[:nbytes]
        if nbytes:
            self._obey(news or ranks.from_json(message))
        return told[:-1]

    # ---- a step ----

    def _advance(self) -> None:
        if self.network.ranks == 1:
            self._obey(self._news())
        elif self.scheduler.is_empty:
            news = self._news()  # the others wait for a message, not for tokens
            if news:
                self.shared.tell(ranks.to_json(news))
                self._obey(news)
        self._end_cancelled()
        self.scheduler.admit()
        piece = self.scheduler.piece()
        if piece:
            self._prefill(piece)
        scored = self.scheduler.scored_piece()
        if scored:
            self._score(scored)
        streams = self.scheduler.streams()
        if streams:
            self._decode(streams)
        self._end_cancelled()

    def _prefill(self, piece: List[Tuple[Continuation, int]]) -> None:
        """Bring tokens into the cache; a prompt that is there as a whole gets its first token."""
        start_s = time.perf_counter()
        with interrupts.held():
            logits = self.network.prefill(*prefill_inputs(
                [Part(c.table, c.ids[c.cached:stop], c.cached) for c, stop in piece], self.pool.block_size))
        choices = []
        for row, (continuation, stop) in enumerate(piece):
            self.scheduler.note_cached(continuation, stop)
            if stop == len(continuation.ids):
                continuation.prefilling = False
                choices.append(_Choice(continuation, row))
        self._choose(choices, logits, start_s, [c for c, _ in piece], "prefill_s")

    def _score(self, piece: List[Tuple[Continuation, int]]) -> None:
        """As `_prefill`, in one row of a decode call for each token: see `decode_inputs`."""
        start_s = time.perf_counter()
        logits = self._rows([Part(c.table, c.ids[c.cached:stop], c.cached) for c, stop in piece])
        choices, row = [], 0
        for continuation, stop in piece:
            first, count = continuation.cached, stop - continuation.cached
            scores = continuation.prompt_logprobs
            if self.network.rank == 0 and scores is not None:
                for place in range(first + 1, min(stop + 1, len(continuation.ids))):
                    scores.append(
                        self._logprobs(logits[row + place - first - 1], continuation.ids[place],
                                       continuation.request.prompt_logprobs or 0))
            row += count
            self.scheduler.note_cached(continuation, stop)
            if stop == len(continuation.ids):
                continuation.prefilling = False
                choices.append(_Choice(continuation, row - 1))
        self._choose(choices, logits, start_s, [c for c, _ in piece], "prefill_s")

    def _decode(self, streams: List[Continuation]) -> None:
        """One more token for every request that is past its prompt, and one for each guess that is right."""
        start_s = time.perf_counter()
        guesses = self._guesses(streams)
        logits = self._rows([Part(c.table, [c.ids[-1], *guessed], len(c.ids) - 1)
                             for c, guessed in zip(streams, guesses)])
        choices, row = [], 0
        for continuation, guessed in zip(streams, guesses):
            self.scheduler.note_cached(continuation, len(continuation.ids))
            continuation.decode_steps += 1
            choices.append(_Choice(continuation, row, guessed))
            row += len(guessed) + 1
        self._choose(choices, logits, start_s, streams, "decode_s")

    def _guesses(self, streams: Sequence[Continuation]) -> List[Tuple[int, ...]]:
        """What may come next in each stream, with blocks for it; the same on every rank."""
        speculation = self.speculation
        if speculation is None or len(streams) > speculation.most_streams:
            return [()] * len(streams)
        rooms = [min(speculation.most, c.limit - len(c.ids) - 1) if c.request.speculate else 0 for c in streams]
        if max(rooms) <= 0:
            return [()] * len(streams)
        made: Sequence[Sequence[int]]
        if self.network.ranks == 1 or speculation.everywhere:
            made = speculation.guess(streams, rooms)
        else:
            told = np.full((len(streams), speculation.most), _NO_GUESS, np.int32)
            if self.network.rank == 0:
                for row, guessed in enumerate(speculation.guess(streams, rooms)):
                    told[row, :len(guessed)] = guessed
            with interrupts.held():
                told = self.network.agree(told.reshape(-1)).reshape(told.shape)
            made = [row[row != _NO_GUESS].tolist() for row in told]
        return [self._with_room(c, guessed[:max(room, 0)]) for c, guessed, room in zip(streams, made, rooms)]

    def _with_room(self, continuation: Continuation, guessed: Sequence[int]) -> Tuple[int, ...]:
        stop_ids = continuation.request.stop_ids
        last = next((i + 1 for i, token in enumerate(guessed) if token in stop_ids), len(guessed))
        return tuple(guessed[:self.scheduler.reserve_guesses(continuation, last)])

    def _rows(self, parts: Sequence[Part]) -> np.ndarray:
        """Logits (rows, V) of a decode call with a row for each of the tokens."""
        return self.network.decode(*decode_inputs(parts, self.pool.block_size))

    def _choose(self, choices: List[_Choice], logits: np.ndarray, start_s: float, took_part: Sequence[Continuation],
                clock: str) -> None:
        """Choose tokens (on rank 0, the same on every rank), add the time to everyone's who took part, and report."""
        tokens = np.zeros(sum(len(choice.guesses) + 1 for choice in choices), np.int32)
        logprobs: Dict[int, LogProbs] = {}
        if self.network.rank == 0 and choices:
            self._fill(tokens, choices, logits, logprobs)
        chosen = self._agree(tokens).tolist()
        spent_s = time.perf_counter() - start_s
        for continuation in took_part:
            setattr(continuation, clock, getattr(continuation, clock) + spent_s)
        at = 0
        for choice in choices:
            self._take(choice, chosen[at:at + len(choice.guesses) + 1], logprobs, at)
            at += len(choice.guesses) + 1

    def _fill(self, tokens: np.ndarray, choices: List[_Choice], logits: np.ndarray,
              logprobs: Dict[int, LogProbs]) -> None:
        """Choose every token into `tokens`, row by row as long as the guesses are right."""
        rows = [choice.row + i for choice in choices for i in range(len(choice.guesses) + 1)]
        plain = [at for choice, at in _starts(choices) if choice.continuation.sampler.is_plain_greedy
                 for at in range(at, at + len(choice.guesses) + 1)]
        if len(plain) == len(tokens):
            tokens[:] = self._argmax(logits, rows)
        elif plain:
            tokens[plain] = self._argmax(logits, [rows[at] for at in plain])
        for choice, start in _starts(choices):
            sampler, wanted = choice.continuation.sampler, choice.continuation.request.logprobs
            for i in range(len(choice.guesses) + 1):
                at = start + i
                if not sampler.is_plain_greedy:
                    tokens[at] = _chosen(sampler, logits[rows[at]])
                if wanted and tokens[at] >= 0:
                    logprobs[at] = self._logprobs(logits[rows[at]], int(tokens[at]), wanted)
                if i < len(choice.guesses) and (tokens[at] != choice.guesses[i]
                                                or tokens[at] in choice.continuation.request.stop_ids):
                    break

    def _argmax(self, logits: np.ndarray, rows: Sequence[int]) -> np.ndarray:
        """The most probable token of each of these rows, -1 where the logits are not finite."""
        found = self.network.largest(logits)
        if found is not None:
            return found if len(rows) == len(found) else found[rows]
        if len(rows) < len(logits):
            logits = logits[rows]
        try:
            return self.selection.argmax(logits)
        except NonFiniteLogits:
            found = np.full(len(logits), _FAILED, np.int32)
            for row in range(len(logits)):
                try:
                    found[row] = self.selection.argmax(logits[row:row + 1])[0]
                except NonFiniteLogits:
                    pass
            return found

    def _logprobs(self, row: np.ndarray, token: int, count: int) -> LogProbs:
        chosen = float(sampling.log_probabilities(row, [token])[0])
        if not count:
            return LogProbs(chosen, ())
        top_ids, top = sampling.most_probable(row, count, self.selection)
        return LogProbs(chosen, tuple((int(i), float(value)) for i, value in zip(top_ids, top)))

    # ---- what came of it ----

    def _take(self, choice: _Choice, tokens: List[int], logprobs: Dict[int, LogProbs], at: int) -> None:
        """Add the tokens that were chosen, up to the first that is not as guessed."""
        continuation, guesses = choice.continuation, choice.guesses
        if continuation.number in self._cancelled:
            return
        right = next((i for i, guess in enumerate(guesses) if tokens[i] != guess), len(guesses))
        continuation.guessed += len(guesses)
        continuation.accepted += right
        self.guessed_tokens += len(guesses)
        self.accepted_tokens += right
        self._take_each(choice, tokens[:right + 1], logprobs, at)
        if guesses and self.speculation is not None and continuation.number in self._known:
            self.scheduler.return_guesses(continuation)
            self.speculation.learn(continuation, guesses, right)

    def _take_each(self, choice: _Choice, tokens: List[int], logprobs: Dict[int, LogProbs], at: int) -> None:
        continuation = choice.continuation
        for i, token in enumerate(tokens):
            if i:  # the guess before it was accepted: its keys and values stay
                self.scheduler.note_cached(continuation, len(continuation.ids))
            if token == _FAILED:
                self._end(continuation, FAILED, error=self._non_finite(continuation))
                return
            if token == _COMPLETE or continuation.limit == len(continuation.request.prompt):
                self._end(continuation, STOP if token == _COMPLETE else LENGTH)
                return
            continuation.ids.append(token)
            reason = None
            if token in continuation.request.stop_ids:
                reason = STOP
            elif len(continuation.ids) >= continuation.limit:
                reason = LENGTH
            if reason is not None:
                self._end(continuation, reason, token, logprobs.get(at + i))
                return
            self._report(continuation, token, None, None, logprobs.get(at + i))

    def _report(self, continuation: Continuation, token: Optional[int], reason: Optional[str], usage: Optional[Usage],
                logprobs: Optional[LogProbs], error: Optional[UserError] = None) -> None:
        scored, continuation.prompt_logprobs = continuation.prompt_logprobs, None  # an empty list is told too
        step = Step(continuation.number, token, reason, usage, logprobs, scored, error)
        box = self._boxes.get(continuation.number)
        if box is None:
            self._loose.append(step)
        else:
            box.append(step)

    def _end(self, continuation: Continuation, reason: str, token: Optional[int] = None,
             logprobs: Optional[LogProbs] = None, error: Optional[UserError] = None) -> None:
        usage = Usage(len(continuation.request.prompt), continuation.reused or 0, continuation.generated,
                      continuation.prefill_s, continuation.decode_s, continuation.decode_steps,
                      *((continuation.guessed, continuation.accepted) if self._guesses_for(continuation) else ()))
        if reason == FAILED:
            self.scheduler.distrust(continuation)
        self._report(continuation, token, reason, usage, logprobs, error)
        self._leave(continuation.number)

    def _guesses_for(self, continuation: Continuation) -> bool:
        return self.speculation is not None and continuation.request.speculate

    def _end_cancelled(self) -> None:
        for number in sorted(self._cancelled):
            if number in self._known:
                self._end(self._known[number], CANCELLED)
        self._cancelled.clear()

    def _non_finite(self, continuation: Continuation) -> UserError:
        if self._broken_weight is None:  # it reads every weight: once per process is enough
            self._broken_weight = (self.network.find_non_finite(),)
        return non_finite_error(continuation.request.label, continuation.generated, self._broken_weight[0])


def non_finite_error(label: str, generated: int, weight: Optional[str]) -> UserError:
    """What is said of a request whose logits are NaN or infinite, after so many tokens; `weight` is the one that is
    not finite."""
    if weight:
        return UserError(f"{label}: the logits are not finite (NaN or infinity) because weight {weight} is not",
                         fix="Convert or download the checkpoint again.", exit_code=EXIT_FAILED)
    return UserError(f"{label}: the logits are not finite (NaN or infinity) after {generated} generated tokens, "
                     "all weights are finite", exit_code=EXIT_FAILED,
                     fix="Activations overflow: use compute_dtype and param_init_type bfloat16 or float32.")


def _starts(choices: Sequence[_Choice]) -> Iterator[Tuple[_Choice, int]]:
    """Each choice with the place of its first token."""
    at = 0
    for choice in choices:
        yield choice, at
        at += len(choice.guesses) + 1


def _chosen(sampler: Sampler, logits: np.ndarray) -> int:
    try:
        return sampler.choose(logits)
    except NonFiniteLogits:
        return _FAILED
    except NothingAllowed:
        return _COMPLETE
