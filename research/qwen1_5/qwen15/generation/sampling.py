"""Logits -> next token id, with Hugging Face's semantics: repetition penalty, temperature, top_k, top_p, in that order.

Selecting over the vocabulary is done by the kernel library where there is one; the functions here are its plain twins.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Callable, NamedTuple, Optional, Sequence, Tuple

import numpy as np


class NonFiniteLogits(Exception):
    """The logits hold NaN or +infinity: a weight or an activation is broken, and any token would be made up."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen.

    Attributes:
        do_sample: draw from the distribution; otherwise the most probable token is taken (greedy).
        temperature: logits are divided by it; > 0.
        top_k: only the k most probable tokens (and those that tie with the k-th); 0 keeps all.
        top_p: only the smallest set of most probable tokens whose probability reaches top_p, the crossing token included; 1
            keeps all.
        repetition_penalty: logits of tokens already in the text are divided by it when positive, multiplied when negative
            (Keskar et al., 2019, arXiv:1909.05858); 1 changes nothing.
        seed: start of the random numbers.
        stream: separates requests with the same seed (equal prompts in one batch).
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stream: int = 0


class Candidates(NamedTuple):
    """Tokens that may be drawn, most probable first (the whole vocabulary: by id): values (N,) float32 logits, ids (N,) int32."""

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
    """The k largest of row (V,) and those equal to the k-th, ordered by value, then by id; one NaN when there is any NaN."""
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


def accelerated(library) -> Selection:
    """The same searches through the kernel library (`kernels.library.Library`), which refuses NaN with a ValueError."""

    def fast_argmax(logits: np.ndarray) -> np.ndarray:
        try:
            ids = library.argmax(logits)
        except ValueError:
            raise NonFiniteLogits from None
        if not all(math.isfinite(row[token]) for row, token in zip(logits, ids.tolist())):
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


class Sampler:
    """Chooses one request's tokens.

    Args:
        params: how.
        prompt: the prompt's token ids; with what is chosen they make the text that the repetition penalty looks at.
        selection: the searches over the vocabulary.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], selection: Selection = PLAIN):
        self.params = params
        self._select = selection
        self._seen = set(prompt)
        key = hashlib.blake2b(f"{params.seed}/{params.stream}".encode(), digest_size=16).digest()
        self._random = np.random.Generator(np.random.Philox(key=np.frombuffer(key, np.uint64)))

    @property
    def is_plain_greedy(self) -> bool:
        """The choice is the argmax of the untouched logits, so a whole batch can be searched at once."""
        return not self.params.do_sample and self.params.repetition_penalty == 1.0

    def note(self, token: int) -> None:
        """A token was chosen for this request elsewhere."""
        self._seen.add(token)

    def choose(self, logits: np.ndarray) -> int:
        """The next token for logits (V,) float32, which are left as they are.

        Raises:
            NonFiniteLogits: there is NaN or +infinity among them.
        """
        row = self.penalised(logits)
        if self.params.do_sample:
            token = self._draw(row, self.candidates(row))
        else:
            token = int(self._select.argmax(row[None])[0])
        self._seen.add(token)
        return token

    def penalised(self, logits: np.ndarray) -> np.ndarray:
        """logits (V,) after the repetition penalty; a copy when it changes anything."""
        penalty = self.params.repetition_penalty
        if penalty == 1.0:
            return logits
        # A prompt may hold ids beyond the logits only if someone made it up; the engine has refused that.
        seen = np.fromiter(self._seen, np.int64, len(self._seen))
        values = logits[seen]
        row = logits.copy()
        row[seen] = np.where(values < 0, values * np.float32(penalty), values / np.float32(penalty))
        return row

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
        return found

    def _draw(self, row: np.ndarray, candidates: Candidates) -> int:
        if not math.isfinite(candidates.values.max()):
            raise NonFiniteLogits
        # In the order of ids: in that of probability, two neighbours that change places by a rounding error would change the token.
        ids = np.sort(candidates.ids)
        cumulative = np.cumsum(_softmax(row[ids], self.params.temperature))
        if not math.isfinite(cumulative[-1]):
            raise NonFiniteLogits
        point = self._random.random() * cumulative[-1]
        return int(ids[min(int(np.searchsorted(cumulative, point, side="right")), len(cumulative) - 1)])


def log_probabilities(logits: np.ndarray, ids: Sequence[int]) -> np.ndarray:
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
    return int(np.random.SeedSequence().entropy % (1 << 63)) if seed is None else seed
