"""How weights are asked for that few tokens meet: chosen by a short measurement, kept for each kind of CPU."""

from __future__ import annotations

import json
import os
import re
from typing import Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from .. import machine
from ..errors import UserError
from ..whole_file import write_whole
from .library import Library

VARIABLE = "QWEN15_READING"
HINTS = {"none": 0, "outer": 1, "near": 3}
"""Name -> locality, as compilers count it: no prefetch, into the outer caches, into all of them."""
_LEAST_AHEAD, _MOST_AHEAD, _LINE = 64, 1 << 20, 64
_FORMAT = 1
_COLS, _ROWS, _ROWS_A_THREAD = 1024, 4096, 1024
_TOKENS = (1, 4)
_ROUNDS = 3
_HOPELESS, _WORTH_IT = 1.25, 0.93


class Way(NamedTuple):
    """A way of reading. None changes a bit of any result.

    Attributes:
        hint: one of `HINTS`.
        ahead: bytes, from what is read to what is asked for meanwhile; 0 with "none".
        places: of a matrix that each thread reads side by side, 1 or 2.
    """

    hint: str
    ahead: int
    places: int

    def __str__(self) -> str:
        return f"{self.hint},{self.ahead},{self.places}"


DEFAULT = Way("outer", 4096, 2)
WAYS = (DEFAULT, Way("outer", 8192, 2), Way("near", 4096, 2), Way("near", 2048, 2), Way("none", 0, 2),
        Way("outer", 4096, 1), Way("near", 4096, 1), Way("none", 0, 1))
"""What is tried. Another one is taken only where it is clearly faster than the first."""


def forced() -> Optional[Way]:
    """The way that the environment asks for.

    Raises:
        UserError: it asks for one that cannot be.
    """
    text = os.environ.get(VARIABLE, "")
    if not text:
        return None
    way = _parsed(text.split(","))
    if way is None:
        raise UserError(f"wants a hint ({', '.join(HINTS)}), a distance in bytes (a multiple of {_LINE} up to "
                        f"{_MOST_AHEAD}; 0 with none) and places (1 or 2), like {DEFAULT}, not {text[:40]!r}",
                        VARIABLE, "Unset it to let a measurement choose.")
    return way


def choose(kernels: Library, may_measure: bool = True) -> Tuple[Way, str]:
    """The way for this machine, and whence it is known.

    Args:
        kernels: the library, with the instruction set and the threads it will run.
        may_measure: whether what is not known yet is measured now (under 0.2 s) and kept.

    Raises:
        UserError: see `forced`.
    """
    way = forced()
    if way is not None:
        return way, f"by {VARIABLE}"
    path = cache_path(kernels)
    way = _kept(path)
    if way is not None:
        return way, f"measured before, {path}"
    if not may_measure:
        return DEFAULT, "until a run measures it"
    way = measured(kernels)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_whole(path, json.dumps({"format": _FORMAT, "hint": way.hint, "ahead": way.ahead,
                                      "places": way.places}).encode() + b"\n")
    except OSError as error:
        return way, f"measured now; not kept ({path}: {error.strerror})"
    return way, f"measured now, kept in {path}"


def use(kernels: Library) -> None:
    """Read as `choose` says from now on."""
    way, _ = choose(kernels)
    _take(kernels, way)


def cache_path(kernels: Library) -> str:
    """Where the way for this CPU, instruction set and number of threads is kept."""
    cpu = re.sub(r"[^A-Za-z0-9]+", "-", machine.cpu_model()).strip("-").lower()[:80] or "cpu"
    return os.path.join(machine.cache_folder("reading"), f"{cpu}-{kernels.kernels}-{kernels.threads}.json")


def measured(kernels: Library) -> Way:
    """The fastest of `WAYS` on this machine now, at 1 and 4 tokens; weights come from memory, not from its caches."""
    rows = max(_ROWS, kernels.threads * _ROWS_A_THREAD)
    weights = np.full((rows, _COLS), 0x3C00, np.uint16)  # ones; pages never written would all be one
    try:
        times: Dict[Way, List[float]] = {}
        left = list(WAYS)
        for _ in range(_ROUNDS):
            for way in left:
                _take(kernels, way)
                took = [kernels.reading_seconds(weights, tokens) for tokens in _TOKENS]
                times[way] = [min(pair) for pair in zip(took, times.get(way, took))]
            fastest = min(_score(times[way], times[DEFAULT]) for way in left)
            left = [way for way in left if way == DEFAULT or _score(times[way], times[DEFAULT]) < _HOPELESS * fastest]
    finally:
        _take(kernels, DEFAULT)
    best = min(left, key=lambda way: _score(times[way], times[DEFAULT]))
    return best if _score(times[best], times[DEFAULT]) < _WORTH_IT else DEFAULT


def _score(times: List[float], against: List[float]) -> float:
    return sum(mine / theirs for mine, theirs in zip(times, against)) / len(times)


def _take(kernels: Library, way: Way) -> None:
    kernels.read_by(HINTS[way.hint], way.ahead, way.places)


def _kept(path: str) -> Optional[Way]:
    """What the file says; None where there is none or it is damaged: it is measured again then."""
    try:
        with open(path, encoding="ascii") as file:
            said = json.load(file)
        if said["format"] != _FORMAT:
            return None
        return _parsed([said["hint"], str(said["ahead"]), str(said["places"])])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _parsed(words: List[str]) -> Optional[Way]:
    if len(words) != 3 or words[0] not in HINTS or not all(re.fullmatch("[0-9]{1,8}", word) for word in words[1:]):
        return None
    way = Way(words[0], int(words[1]), int(words[2]))
    fits = way.ahead == 0 if way.hint == "none" else _LEAST_AHEAD <= way.ahead <= _MOST_AHEAD and way.ahead % _LINE == 0
    return way if fits and way.places in (1, 2) else None
