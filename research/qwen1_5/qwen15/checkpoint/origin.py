"""Whether slices belong together: converting leaves a record of the source in them; what all ranks hold is alike."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Dict, List, Mapping, Optional, Sequence

import numpy as np

from .. import naming
from ..errors import UserError
from .reader import Checkpoint
from .view import View

SOURCE = "source"
SLICE = "slice"
"""Keys in the metadata of a .safetensors file: a digest of the checkpoint that it was made from, and `rank of ranks`.
A .ckpt file has no place for them."""

_PIECES, _PIECE_BYTES = 4, 1024
_FIX = "The slices are not of one checkpoint: copy all rank_x folders from one conversion, or slice again."


def source_of(ranks: Sequence[Checkpoint]) -> str:
    """The digest of the source of a checkpoint, whole or in slices: as recorded in it, or its own.

    A sample of every tensor goes into it, so that fine-tuned models, which share norms and embedding, differ.
    """
    recorded = _recorded(ranks[0], SOURCE)
    if recorded:
        return recorded[0]
    total = hashlib.blake2b(digest_size=16)
    for number, rank in enumerate(ranks):
        stored = _stored(rank)
        names = {naming.hf_to_ms(name) or name: name for name in stored.infos}
        for name in sorted(names):
            info = stored.infos[names[name]]
            total.update(f"{number} {name} {info.dtype} {info.shape}\n".encode("utf-8", "surrogatepass"))
            total.update(_sample(stored, names[name]))
    return total.hexdigest()


def record(source: str, rank: Optional[int], ranks: int) -> Dict[str, str]:
    """Metadata for a .safetensors file made from `source`: the whole (rank None), or the slice of a rank."""
    made = {SOURCE: source}
    if rank is not None and ranks > 1:
        made[SLICE] = f"{rank} of {ranks}"
    return made


@dataclass(frozen=True)
class Likeness:
    """What has to be the same on every rank.

    Attributes:
        path: where a rank's weights are from.
        source: the digests recorded in its files; empty where none is.
        digests: stored name -> a digest of each tensor that no rank cuts.
    """

    path: str
    source: List[str]
    digests: Dict[str, str]

    @classmethod
    def of(cls, checkpoint: Checkpoint, uncut: Mapping[str, str]) -> "Likeness":
        """That of an open checkpoint; `uncut`: MindSpore name -> stored name. Reads 4 KB of a tensor at most."""
        digests = {}
        for name, stored in uncut.items():
            start = f"{checkpoint.infos[stored].dtype} {checkpoint.infos[stored].shape}\n".encode()
            digests[name] = hashlib.blake2b(start + _sample(checkpoint, stored), digest_size=8).hexdigest()
        return cls(checkpoint.path, _recorded(checkpoint, SOURCE), digests)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, message: bytes) -> "Likeness":
        return cls(**json.loads(message))

    def refuse_other_than(self, first: "Likeness") -> None:
        """Compare with rank 0's.

        Raises:
            UserError: the two are not of one checkpoint, with what differs.
        """
        mine, theirs = set(self.source), set(first.source)
        if len(mine | theirs) > 1 and mine and theirs:
            raise UserError(f"was made from another checkpoint than {first.path}, as the records in both say",
                            self.path, _FIX)
        for name, digest in self.digests.items():
            if first.digests.get(name, digest) != digest:
                raise UserError(f"{name} differs from that in {first.path}, and every rank has to hold the same",
                                self.path, _FIX)


def check_place(checkpoint: Checkpoint, rank: int, ranks: int) -> None:
    """Refuse a slice that its record calls another rank's.

    Raises:
        UserError: a folder was renamed or copied in another's place, or files of several sources lie in one.
    """
    for found in _recorded(checkpoint, SLICE):
        if found != f"{rank} of {ranks}":
            raise UserError(f"holds slice {found} by its own record, where slice {rank} of {ranks} belongs",
                            checkpoint.path, "Copy every rank_x folder under its own name, or slice again.")
    if len(_recorded(checkpoint, SOURCE)) > 1:
        raise UserError("its files were made from different checkpoints, as the records in them say", checkpoint.path,
                        "Convert into an empty folder.")


def check_together(ranks: Sequence[Checkpoint]) -> None:
    """`check_place` for all slices of a checkpoint, and their recorded sources compared.

    Raises:
        UserError: the slices are not of one checkpoint.
    """
    if len(ranks) == 1:
        return
    first = Likeness.of(ranks[0], {})
    for number, rank in enumerate(ranks):
        check_place(rank, number, len(ranks))
        Likeness.of(rank, {}).refuse_other_than(first)


def _recorded(checkpoint: Checkpoint, key: str) -> List[str]:
    """What a checkpoint's files record under a key, each value once."""
    return sorted({file.metadata[key] for file in checkpoint.files if key in file.metadata})


def _stored(checkpoint: Checkpoint) -> Checkpoint:
    """The tensors as they are in the files: making them takes longer."""
    while isinstance(checkpoint, View):
        checkpoint = checkpoint.source
    return checkpoint


def _sample(checkpoint: Checkpoint, name: str) -> bytes:
    """The bytes of a small tensor, or pieces from begin to end of a large one."""
    nbytes = checkpoint.infos[name].nbytes
    if nbytes <= _PIECES * _PIECE_BYTES:
        starts, size = [0], nbytes
    else:
        starts, size = [(nbytes - _PIECE_BYTES) * piece // (_PIECES - 1) for piece in range(_PIECES)], _PIECE_BYTES
    buffer = np.empty(size, np.uint8)
    parts = []
    for start in starts if size else []:
        checkpoint.read_into(name, start, buffer)
        parts.append(buffer.tobytes())
    return b"".join(parts)
