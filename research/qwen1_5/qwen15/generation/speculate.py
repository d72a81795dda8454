"""Guesses of the tokens that come next, so that one reading of the weights makes several: prompt lookup, and how many.

A guess is checked by the network itself: the rows of a decode call are the stream's last token and its guesses behind
it, each row's token is chosen as it would be without guesses, and the guesses count as far as they are what was chosen.
So what is generated does not depend on them, only how many steps it takes; random numbers are used in the same order.

How many guesses a step has follows from how often earlier ones were right and from what a row costs (`step_cost`). Both
are counted, not timed: a run repeats the same steps, and ranks that are told the same guess the same.
"""

from __future__ import annotations

import heapq
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from ..config.speculation import NGRAM_TOKENS
from .scheduler import Continuation

_COST = ((1, 1.0), (2, 1.04), (3, 1.10), (5, 1.27), (6, 1.40), (8, 1.75), (16, 3.0), (32, 5.5))
"""(rows of a decode call, its time over that of one row) with float weights, measured on AVX2."""
_COST_QUANTISED = ((1, 1.0), (2, 1.1), (3, 1.3), (4, 1.5), (6, 2.0), (8, 2.6), (16, 4.9), (32, 10.0))
"""The same with quantised weights, which take less time to read and more to compute with (int4, AVX2)."""


class Speculation:
    """What the engine asks for guesses.

    Attributes:
        most: most guesses of a stream in a step.
        most_streams: with more streams than this nothing is guessed: they already share each reading of the weights.
        everywhere: each rank guesses for itself, and all the same; otherwise rank 0 guesses and tells.
    """

    most: int
    most_streams: int
    everywhere: bool

    def guess(self, streams: Sequence[Continuation], rooms: Sequence[int]) -> List[List[int]]:
        """For each stream up to `rooms` tokens (0 or less: none) that may follow its ids."""
        raise NotImplementedError

    def learn(self, continuation: Continuation, guesses: Sequence[int], right: int) -> None:
        """The first `right` of a stream's guesses were what was chosen; its ids have grown by one more than that."""

    def forget(self, continuation: Continuation) -> None:
        """The stream has ended."""


class Told(Speculation):
    """For the ranks that are told rank 0's guesses."""

    everywhere = False

    def __init__(self, most: int, most_streams: int):
        self.most, self.most_streams = most, most_streams


# ---- how many ----

def step_cost(rows: int, quantised: bool = False) -> float:
    """Time of a decode call with so many rows, over that of one with a single row."""
    points = _COST_QUANTISED if quantised else _COST
    place = next((i for i in range(1, len(points) - 1) if rows <= points[i][0]), len(points) - 1)
    (x, y), (x_next, y_next) = points[place - 1:place + 1]
    return y + (y_next - y) * (rows - x) / (x_next - x)


def most_streams(quantised: bool) -> int:
    """The most streams that a sure guess still makes faster."""
    return next(n for n in range(1, 33)
                if (n + 2) / step_cost(n + 2, quantised) <= (n + 1) / step_cost(n + 1, quantised) * 1.02)


def worth(chances: Sequence[float], rooms: Sequence[int], quantised: bool = False, draft_cost: float = 0.0
          ) -> List[int]:
    """How many guesses of each stream make the most tokens in the least time.

    With p the chance of a stream's guess, the one after i others counts for p^(i+1) tokens. Guesses are added by what
    they count for, and of all the sums on the way the one with the most tokens for its time is taken.

    Args:
        chances: of each stream, that a guess is right when those before it are.
        rooms: most guesses of each stream.
        quantised: the weights are.
        draft_cost: time of the draft's call that makes the next guess of all streams, over a step of one row.
    """
    most = max(rooms, default=0)
    plans = [(len(chances) / step_cost(len(chances), quantised), [0] * len(chances))]
    for depth in range(1 if draft_cost else most, most + 1):
        if depth > 0:
            plans.append(_within(chances, [min(room, depth) for room in rooms], quantised, depth * draft_cost))
    return max(plans, key=lambda plan: plan[0])[1]


def _within(chances: Sequence[float], rooms: Sequence[int], quantised: bool, extra: float) -> Tuple[float, List[int]]:
    """(tokens for their time, how many guesses of each stream), `extra` time being spent on making them."""
    rows = len(chances)
    counts, expected, best = [0] * rows, float(rows), 0.0
    kept = list(counts)
    heap = [(-chance, place) for place, chance in enumerate(chances) if rooms[place] > 0 and chance > 0]
    heapq.heapify(heap)
    while heap:
        value, place = heapq.heappop(heap)
        counts[place] += 1
        rows += 1
        expected -= value
        rate = expected / (step_cost(rows, quantised) + extra)
        if rate > best:
            best, kept = rate, list(counts)
        if counts[place] < rooms[place]:
            heapq.heappush(heap, (value * chances[place], place))
    return best, kept


class SuccessRate:
    """How often guesses of one kind have been right, the latest ones counting most.

    Args:
        prior: what is taken for granted in the beginning, and slowly again while no guess is made, so that one is made
            now and then.
        memory: how much of the old a new observation leaves.
        patience: how slowly; a part of the way back for each step without a guess.
    """

    def __init__(self, prior: float, memory: float = 0.9, patience: float = 0.004):
        self.chance = self._prior = prior
        self._memory, self._patience = memory, patience

    def learn(self, count: int, right: int) -> None:
        """Of `count` guesses behind each other the first `right` were right; what came after a wrong one says
        nothing."""
        for value in [1.0] * right + [0.0] * (right < count):
            self.chance += (1.0 - self._memory) * (value - self.chance)

    def rest(self) -> None:
        """No guess was worth its time."""
        self.chance += self._patience * (self._prior - self.chance)


# ---- prompt lookup ----

_PRIORS = (0.2, 0.4, 0.55, 0.65, 0.75, 0.8, 0.85, 0.9)
"""Chance of a guess by how many tokens before it agree with those before the place it is taken from, from 1 on."""
_PLACES = 16
"""Places that are compared, the latest ones."""
_AGREEMENT = 16
"""Tokens that are compared at most."""


class Found(NamedTuple):
    """Where a text went on before: the place after a passage that agrees with its end in so many tokens."""

    place: int
    agreement: int


class Passages:
    """The places of a growing text's tokens and pairs of tokens.

    Args:
        ids: the text; it is read again at every call.
    """

    def __init__(self, ids: List[int]):
        self._ids = ids
        self._after: Dict[Tuple[int, ...], List[int]] = {}
        self._read = 0

    def find(self) -> Optional[Found]:
        """The passage that agrees best with the text's end, of equal ones the latest; None without any."""
        ids, after = self._ids, self._after
        for place in range(self._read + 1, len(ids)):  # what follows each token but the last
            after.setdefault((ids[place - 1],), []).append(place)
            if place > 1:
                after.setdefault((ids[place - 2], ids[place - 1]), []).append(place)
        self._read = len(ids) - 1
        best: Optional[Found] = None
        for place in reversed(after.get((ids[-2], ids[-1]), [])[-_PLACES:] if len(ids) > 1 else []):
            agreement = self._agreement(place)
            if best is None or agreement > best.agreement:
                best = Found(place, agreement)
            if agreement == _AGREEMENT:
                break
        if best is None and (ids[-1],) in after:
            best = Found(after[ids[-1],][-1], 1)
        return best

    def _agreement(self, place: int) -> int:
        ids, end = self._ids, len(self._ids)
        most = min(_AGREEMENT, place)
        same = 2
        while same < most and ids[place - 1 - same] == ids[end - 1 - same]:
            same += 1
        return same

    def following(self, found: Found, count: int) -> List[int]:
        """The `count` tokens that followed there; a passage that reaches the text's end repeats itself."""
        period = len(self._ids) - found.place
        return [self._ids[found.place + i % period] for i in range(count)]


class _Reader:
    """One stream's text and how well it can be guessed."""

    def __init__(self, continuation: Continuation):
        self.passages = Passages(continuation.ids)
        self.records = [SuccessRate(prior) for prior in _PRIORS]
        self.used = self.records[0]


class PromptLookup(Speculation):
    """Guesses that the text goes on as it did where its last tokens stood before, in the prompt or in the answer.

    Args:
        most: most guesses of a stream in a step.
        quantised: the network's weights are, which makes rows dearer.
    """

    everywhere = True

    def __init__(self, most: int = NGRAM_TOKENS, quantised: bool = False):
        self.most, self.most_streams = most, most_streams(quantised)
        self._quantised = quantised
        self._readers: Dict[int, _Reader] = {}

    def guess(self, streams: Sequence[Continuation], rooms: Sequence[int]) -> List[List[int]]:
        founds = [self._found(c) if room > 0 else None for c, room in zip(streams, rooms)]
        chances = [0.0 if found is None else self._readers[c.number].used.chance for c, found in zip(streams, founds)]
        counts = worth(chances, [room if chance else 0 for room, chance in zip(rooms, chances)], self._quantised)
        made: List[List[int]] = [[] for _ in streams]
        for continuation, found, count, guesses in zip(streams, founds, counts, made):
            if found is None:
                continue
            reader = self._readers[continuation.number]
            if not count:
                reader.used.rest()
            guesses += reader.passages.following(found, count)
        return made

    def _found(self, continuation: Continuation) -> Optional[Found]:
        reader = self._readers.get(continuation.number)
        if reader is None:
            reader = self._readers[continuation.number] = _Reader(continuation)
        found = reader.passages.find()
        if found is not None:
            reader.used = reader.records[min(found.agreement, len(_PRIORS)) - 1]
        return found

    def learn(self, continuation: Continuation, guesses: Sequence[int], right: int) -> None:
        self._readers[continuation.number].used.learn(len(guesses), right)

    def forget(self, continuation: Continuation) -> None:
        self._readers.pop(continuation.number, None)
