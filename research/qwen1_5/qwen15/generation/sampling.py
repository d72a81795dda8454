"""Logits -> next token id: first what edits logits (logit_bias to a constraint), then temperature, top_k, top_p, min_p.

Order and meaning are Hugging Face transformers'; presence_penalty and frequency_penalty are vLLM's and OpenAI's.
Selecting over the vocabulary is done by the kernel library where there is one; the functions here are its plain twins.
"""

from __future__ import annotations

import copy
import hashlib
import math
import secrets
from collections import Counter, deque
from dataclasses import dataclass
from typing import (
    Any,
    Callable,
    Deque,
    Dict,
    FrozenSet,
    List,
    NamedTuple,
    Optional,
    Protocol,
    Sequence,
    Set,
    Tuple,
    Union,
)

import numpy as np


class NonFiniteLogits(Exception):
    """The logits hold NaN or +infinity: a weight or an activation is broken, and any token would be made up."""


class NothingAllowed(Exception):
    """The constraint leaves no token: the text is complete."""


class TokenMask(Protocol):
    """What a constraint on one request's text says from token to token, for instance that it is JSON."""

    def allowed(self) -> Optional[np.ndarray]:
        """A bit for each token id, lowest bit first, (ceil(V / 32),) int32 or uint32; None allows all."""

    def accept(self, token: int) -> None:
        """This token was chosen."""


Constraint = Callable[[], TokenMask]
"""Makes a request's own TokenMask, at the beginning of its text."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen.

    Attributes:
        do_sample: draw from the distribution; otherwise the most probable token is taken (greedy).
        temperature: logits are divided by it; > 0.
        top_k: only the k most probable tokens (and those that tie with the k-th); 0 keeps all.
        top_p: only the smallest set of most probable tokens whose probability reaches top_p, the crossing token
            included; 1 keeps all.
        repetition_penalty: logits of tokens already in the text are divided by it when positive, multiplied when
            negative (Keskar et al., 2019, arXiv:1909.05858); 1 changes nothing.
        seed: start of the random numbers.
        stream: separates requests with the same seed (equal prompts in one batch).
        min_p: only tokens with at least this part of the most probable one's probability; 0 keeps all.
        presence_penalty: taken from the logits of tokens that have been generated (the prompt does not count).
        frequency_penalty: taken from them once for each time they were generated.
        min_new_tokens: the stop ids cannot be chosen before this many tokens.
        no_repeat_ngram_size: no token that would repeat an n-gram of the text, prompt included; 0 allows all.
        logit_bias: (token id, number) pairs; the number is added to the token's logit. -infinity forbids it.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stream: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_new_tokens: int = 0
    no_repeat_ngram_size: int = 0
    logit_bias: Tuple[Tuple[int, float], ...] = ()

    @property
    def bias_ids(self) -> Tuple[int, ...]:
        """The token ids that logit_bias names."""
        return tuple(token for token, _ in self.logit_bias)

    @property
    def edits_logits(self) -> bool:
        """Something changes logits before a token is searched for."""
        return bool(self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
                    or self.min_new_tokens or self.no_repeat_ngram_size or self.logit_bias)


class Candidates(NamedTuple):
    """Tokens that may be drawn, most probable first (the whole vocabulary: by id).

    Attributes:
        values: (N,) float32 logits.
        ids: (N,) int32.
    """

    values: np.ndarray
    ids: np.ndarray


def argmax(logits: np.ndarray) -> np.ndarray:
    """The most probable token of each row of logits (B, V) -> (B,) int32; the lower id wins a tie.

    Raises:
        NonFiniteLogits: a row's largest value is NaN or +infinity.
    """
    ids = np.argmax(logits, axis=-1).astype(np.int32)  # NumPy's argmax stops at the first NaN
    if not np.isfinite(logits[np.arange(len(ids)), ids]).all():
        raise NonFiniteLogits
    return ids


def top_candidates(row: np.ndarray, k: int) -> Candidates:
    """The k largest of row (V,) and those equal to the k-th, ordered by value, then by id; one NaN when there is
    any."""
    if np.isnan(row).any():
        return Candidates(np.array([np.nan], np.float32), np.zeros(1, np.int32))
    if k >= len(row):
        kept = np.arange(len(row))
    else:
        threshold = np.partition(row, len(row) - k)[len(row) - k]
        kept = np.flatnonzero(row >= threshold)
    order = kept[np.lexsort((kept, -row[kept]))]
    return Candidates(row[order], order.astype(np.int32))


def nucleus_candidates(row: np.ndarray, temperature: float, top_p: float) -> Candidates:
    """The smallest set of most probable tokens of row (V,) at `temperature` whose probability reaches top_p."""
    every = top_candidates(row, len(row))
    return Candidates(*(array[:_nucleus_size(_softmax(every.values, temperature), top_p)] for array in every))


def _softmax(values: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities of `values` in float64."""
    scaled = values.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def _nucleus_size(probabilities: np.ndarray, top_p: float) -> int:
    """How many of the descending probabilities top_p keeps: those with less than top_p before them, at least one."""
    before = np.cumsum(probabilities) - probabilities
    return max(1, int(np.count_nonzero(before < top_p)))


class Selection(NamedTuple):
    """The three searches over the vocabulary; `PLAIN` is NumPy's, the kernel library offers the same."""

    argmax: Callable[[np.ndarray], np.ndarray]
    top_candidates: Callable[[np.ndarray, int], Candidates]
    nucleus_candidates: Callable[[np.ndarray, float, float], Candidates]


PLAIN = Selection(argmax, top_candidates, nucleus_candidates)


def accelerated(library: Any) -> Selection:
    """The same searches through the kernel library (`kernels.library.Library`), which refuses NaN with a ValueError."""

    def fast_argmax(logits: np.ndarray) -> np.ndarray:
        try:
            ids = library.argmax(logits)
        except ValueError:
            raise NonFiniteLogits from None
        if not np.isfinite(logits[np.arange(len(ids)), ids]).all():
            raise NonFiniteLogits
        return ids

    def fast_top_candidates(row: np.ndarray, k: int) -> Candidates:
        if k >= len(row):
            return top_candidates(row, k)
        try:
            values, ids = library.top_candidates(row, k + 1)
        except ValueError:
            raise NonFiniteLogits from None
        if values[k] == values[k - 1]:  # a tie with the k-th: there may be more than one
            return top_candidates(row, k)
        return Candidates(values[:k], ids[:k])

    def fast_nucleus_candidates(row: np.ndarray, temperature: float, top_p: float) -> Candidates:
        try:
            values, ids, _, _ = library.nucleus(row, temperature, top_p)
        except ValueError:
            raise NonFiniteLogits from None
        return Candidates(values, ids)

    return Selection(fast_argmax, fast_top_candidates, fast_nucleus_candidates)


class _Randoms:
    """A request's random numbers, of which the next ones can be looked at before they are used."""

    def __init__(self, seed: int, stream: int):
        key = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=16).digest()
        self._generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key, np.uint64)))
        self._ahead: Deque[float] = deque()

    def next(self) -> float:
        """The next one, from 0 to 1."""
        return self._ahead.popleft() if self._ahead else self._generator.random()

    def ahead(self, place: int) -> float:
        """The one that comes after `place` others."""
        while len(self._ahead) <= place:
            self._ahead.append(self._generator.random())
        return self._ahead[place]


class Sampler:
    """Chooses one request's tokens.

    Args:
        params: how.
        prompt: the prompt's token ids; with what is chosen they make the text that penalties look at.
        selection: the searches over the vocabulary.
        stop_ids: what min_new_tokens holds back.
        mask: which tokens a constraint allows.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], selection: Selection = PLAIN,
                 stop_ids: FrozenSet[int] = frozenset(), mask: Optional[TokenMask] = None):
        self.params = params
        self.is_plain_greedy = not params.do_sample and not params.edits_logits and mask is None
        """The choice is the argmax of the untouched logits: a whole batch can be searched at once, nothing is noted."""
        self._select = selection
        self._stop_ids = sorted(stop_ids)
        self._mask = mask
        self._seen: Set[int] = set(prompt)
        self._made: Counter[int] = Counter()
        self._count = 0
        self._ngrams = _NGrams(params.no_repeat_ngram_size, prompt) if params.no_repeat_ngram_size else None
        self._randoms: Optional[_Randoms] = None
        self._place: Optional[int] = None

    def imagined(self) -> "Sampler":
        """A copy that chooses with the same random numbers, and leaves this one as it is; it knows no constraint."""
        made = copy.copy(self)
        made._mask = None
        made._seen, made._made = set(self._seen), Counter(self._made)
        made._ngrams = None if self._ngrams is None else self._ngrams.imagined()
        made._randoms, made._place = self._own_randoms(), 0
        return made

    def _own_randoms(self) -> _Randoms:
        if self._randoms is None:
            self._randoms = _Randoms(self.params.seed, self.params.stream)
        return self._randoms

    def _random(self) -> float:
        randoms = self._own_randoms()
        if self._place is None:
            return randoms.next()
        self._place += 1
        return randoms.ahead(self._place - 1)

    def note(self, token: int) -> None:
        """A token was chosen."""
        self._seen.add(token)
        self._made[token] += 1
        self._count += 1
        if self._ngrams is not None:
            self._ngrams.add(token)
        if self._mask is not None:
            self._mask.accept(token)

    def choose(self, logits: np.ndarray) -> int:
        """The next token for logits (V,) float32, which are left as they are; it is noted.

        Raises:
            NonFiniteLogits: there is NaN or +infinity among them.
            NothingAllowed: the constraint allows no token.
        """
        row = self.penalised(logits)
        if self.params.do_sample:
            token = self._draw(row, self.candidates(row))
        else:
            token = int(self._select.argmax(row[None])[0])
        self.note(token)
        return token

    def penalised(self, logits: np.ndarray) -> np.ndarray:
        """logits (V,) after everything that edits them; a copy when anything does.

        Raises:
            NonFiniteLogits: something edits them and there is NaN or +infinity among them, which an edit could hide.
            NothingAllowed: the constraint allows no token.
        """
        params = self.params
        if not params.edits_logits and self._mask is None:
            return logits
        if not logits.max() < np.inf:
            raise NonFiniteLogits
        row = logits.copy()
        for token, bias in params.logit_bias:
            row[token] += np.float32(bias)
        if params.repetition_penalty != 1.0:
            # A prompt may hold ids beyond the logits only if someone made it up; the engine has refused that.
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            values, penalty = row[seen], np.float32(params.repetition_penalty)
            row[seen] = np.where(values < 0, values * penalty, values / penalty)
        if self._made and (params.presence_penalty or params.frequency_penalty):
            made = np.fromiter(self._made, np.int64, len(self._made))
            times = np.fromiter(self._made.values(), np.float32, len(self._made))
            row[made] -= np.float32(params.frequency_penalty) * times + np.float32(params.presence_penalty)
        if self._ngrams is not None:
            row[self._ngrams.banned()] = -np.inf
        if self._count < params.min_new_tokens:
            row[self._stop_ids] = -np.inf
        self._constrain(row)
        return row

    def _constrain(self, row: np.ndarray) -> None:
        bits = None if self._mask is None else self._mask.allowed()
        if bits is None:
            return
        allowed = np.unpackbits(np.ascontiguousarray(bits).view(np.uint8), bitorder="little", count=len(row)).view(bool)
        np.copyto(row, -np.inf, where=~allowed)
        if not row.max() > -np.inf:
            raise NothingAllowed

    def candidates(self, row: np.ndarray) -> Candidates:
        """What may be drawn from penalised logits (V,)."""
        params = self.params
        if 0 < params.top_k < len(row):
            found = self._select.top_candidates(row, params.top_k)
            if params.top_p < 1.0 and math.isfinite(found.values[0]):
                size = _nucleus_size(_softmax(found.values, params.temperature), params.top_p)
                found = Candidates(found.values[:size], found.ids[:size])
        elif params.top_p < 1.0:
            found = self._select.nucleus_candidates(row, params.temperature, params.top_p)
        else:
            found = Candidates(row, np.arange(len(row), dtype=np.int32))  # sorting them took longer than the network
        if params.min_p > 0.0:
            found = _likely_beside_the_best(found, params.min_p, params.temperature)
        return found

    def _draw(self, row: np.ndarray, candidates: Candidates) -> int:
        if not math.isfinite(candidates.values.max()):
            raise NonFiniteLogits
        # In the order of ids: in that of probability, two neighbours that change places by a rounding error would
        # change the token.
        ids = np.sort(candidates.ids)
        cumulative = np.cumsum(_softmax(row[ids], self.params.temperature))
        if not math.isfinite(cumulative[-1]):
            raise NonFiniteLogits
        point = self._random() * cumulative[-1]
        # Rounding may put the point at the very end: the last token with any probability, which a masked one has not.
        last = int(np.searchsorted(cumulative, cumulative[-1], side="left"))
        return int(ids[min(int(np.searchsorted(cumulative, point, side="right")), last)])


def _likely_beside_the_best(found: Candidates, min_p: float, temperature: float) -> Candidates:
    """The candidates with at least `min_p` of the best one's probability; of their quotient the sum drops out."""
    scaled = found.values.astype(np.float64) / temperature
    best = scaled.max()
    if not math.isfinite(best):
        return found  # refused where one is drawn
    kept = np.exp(scaled - best) >= min_p
    return Candidates(found.values[kept], found.ids[kept])


class _NGrams:
    """The n-grams of a text that grows, by their first n - 1 tokens."""

    def __init__(self, size: int, text: Sequence[int]):
        self._size = size
        self._text: List[int] = []
        self._after: Dict[Tuple[int, ...], Set[int]] = {}
        self._grows = True
        for token in text:
            self.add(token)

    def imagined(self) -> "_NGrams":
        """A copy whose text goes on by itself; of the n-grams it knows those that are there now."""
        made = copy.copy(self)
        made._text, made._grows = self._text[max(0, len(self._text) - self._size + 1):], False
        return made

    def add(self, token: int) -> None:
        """The text goes on with this token."""
        if self._grows and len(self._text) >= self._size - 1:
            self._after.setdefault(self._last(), set()).add(token)
        self._text.append(token)

    def banned(self) -> List[int]:
        """Tokens that would make an n-gram that is there already."""
        return sorted(self._after.get(self._last(), ())) if len(self._text) >= self._size - 1 else []

    def _last(self) -> Tuple[int, ...]:
        return tuple(self._text[len(self._text) - self._size + 1:])


def log_probabilities(logits: np.ndarray, ids: Union[Sequence[int], np.ndarray]) -> np.ndarray:
    """Natural log of the softmax of logits (V,) at `ids` -> (N,) float64."""
    wide = logits.astype(np.float64)
    top = wide.max()
    return wide[np.asarray(ids)] - top - np.log(np.exp(wide - top).sum())


def most_probable(logits: np.ndarray, count: int, selection: Selection = PLAIN) -> Tuple[np.ndarray, np.ndarray]:
    """The `count` most probable ids of logits (V,) and their log probabilities, most probable first."""
    found = selection.top_candidates(logits, count)
    ids = found.ids[:count]
    return ids, log_probabilities(logits, ids)


def pick_seed(seed: Optional[int]) -> int:
    """`seed`, or a fresh one from the operating system when it is None."""
    return secrets.randbits(63) if seed is None else seed
