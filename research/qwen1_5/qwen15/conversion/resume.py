"""What an interrupted conversion has on the disk already: recorded beside its files for the next run."""

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Tuple

from ..checkpoint.atomic import AtomicFolder, write_small
from ..checkpoint.casting import Count
from ..checkpoint.tensors import total_bytes
from .strips import Tally

if TYPE_CHECKING:
    from .plan import Plan

RECORD_FILE = ".plan.json"
_KEYS = {"fingerprint", "done", "moves", "begun", "casts", "non_finite"}


class Record:
    """How far a run of a plan into a folder has come. Only what the disk is known to have is written down.

    Attributes:
        done: files that are whole.
        tally: of the tensors in them and in the files begun.
    """

    def __init__(self, plan: "Plan", folder: AtomicFolder):
        """Take up what is recorded in the folder if it is of the same plan and sources; clear the folder if not."""
        self._path = os.path.join(folder.path, RECORD_FILE)
        self._fingerprint = fingerprint(plan)
        self._moves = 0
        self._begun: Dict[str, int] = {}
        self.done: List[str] = []
        self.tally = Tally()
        saved = _read(self._path)
        if saved is None or saved["fingerprint"] != self._fingerprint:
            folder.clear()
            return
        sizes = {file.name: total_bytes(file.steps()) for file in plan.files}
        self.done = [name for name in saved["done"] if _size_of(os.path.join(folder.path, name)) == sizes.get(name)]
        if all(_size_of(os.path.join(folder.path, name)) >= nbytes for name, nbytes in saved["begun"].items()):
            self._moves, self._begun = saved["moves"], saved["begun"]
        self.tally.non_finite = {name: tuple(counts) for name, counts in saved["non_finite"].items()}
        self.tally.casts = {tuple(key.split(">")): Count(*counts) for key, counts in saved["casts"].items()}

    def begun(self, names: Sequence[str]) -> Tuple[int, Mapping[str, int]]:
        """(moves that are done, file -> bytes of it that are written) of files that are written together."""
        return (self._moves, self._begun) if set(names) == set(self._begun) else (0, {})

    def keeps(self, name: str) -> bool:
        """Whether the record says anything about a file, which then is of use to the next run."""
        return name in self._begun or name in self.done

    def begin(self, moves: int, sizes: Mapping[str, int]) -> None:
        """Write down that the disk has the first `moves` moves of files that are written together, so much of each."""
        self._save(self.done, moves, dict(sizes))

    def finish(self, names: Sequence[str]) -> None:
        """Write down that the disk has these files."""
        self._save(self.done + list(names), 0, {})

    def _save(self, done: List[str], moves: int, begun: Dict[str, int]) -> None:
        casts = {">".join(key): [count.tensors, count.values, count.to_zero, count.overflowed]
                 for key, count in self.tally.casts.items()}
        content = {"fingerprint": self._fingerprint, "done": done, "moves": moves, "begun": begun, "casts": casts,
                   "non_finite": self.tally.non_finite}
        # In memory first: an interruption while the file is written leaves the old record on the disk, which is still
        # true of the files, and they are kept.
        self.done, self._moves, self._begun = done, moves, begun
        write_small(self._path, json.dumps(content).encode("utf-8"))


def _read(path: str) -> Optional[Dict[str, Any]]:
    try:
        with open(path, "rb") as file:
            saved = json.loads(file.read())
    except (OSError, ValueError):
        return None
    return saved if isinstance(saved, dict) and set(saved) == _KEYS else None


def _size_of(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else -1


def fingerprint(plan: "Plan") -> str:
    """A number for a plan and the state of its sources: the same only if taking up the work gives the same result."""
    sources = [state for source in plan.sources for state in source.state()]
    moves = [[move.label, move.dtype, move.target_dtype, [[d.file, d.name, repr(d.region)] for d in move.destinations]]
             for move in plan.moves]
    files = [[file.name, file.kind, sorted(file.metadata.items())] for file in plan.files]
    small = {name: hashlib.sha256(content).hexdigest() for name, content in plan.small.items()}
    return hashlib.sha256(json.dumps([sources, moves, files, small], sort_keys=True).encode()).hexdigest()
