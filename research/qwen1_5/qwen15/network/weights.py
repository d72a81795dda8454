"""Checkpoint -> parameters, strictly: every key accounted for, every shape checked, only this rank's slices read."""

import os
import re
from typing import Dict, List, Optional, Tuple

import numpy as np

from .. import family, naming
from ..checkpoint import casting, leftovers
from ..checkpoint.reader import open_checkpoint, rank_folders
from ..checkpoint.tensors import LONG_NAMES, SHORT_NAMES
from ..config.schema import ModelConfig
from ..errors import UserError
from ..naming import Dims


def resolve(path: Optional[str], rank: int = 0, ranks: int = 1, whole: bool = True) -> str:
    """The file or folder from which this rank reads its weights.

    Args:
        path: `load_checkpoint`: a file, a folder of files, or a folder with rank_0 .. rank_N-1.
        rank, ranks: this process among the tensor-parallel ones.
        whole: `auto_trans_ckpt`: the checkpoint is whole and every rank cuts its own slices; otherwise it is sliced already.

    Raises:
        UserError: there is nothing there, or something else than this run needs; says what was found and what is expected.
    """
    if not path:
        raise UserError("no checkpoint is given", where="load_checkpoint",
                        fix="Set load_checkpoint in the YAML or pass --load_checkpoint.")
    if not os.path.exists(path):
        raise UserError("no such file or folder", where=f"load_checkpoint {path}", fix=_nearest(path))
    slices = rank_folders(path)
    if not slices:
        if ranks > 1 and not whole:
            last = ranks - 1
            what = (f"a folder with rank_0 .. rank_{last}, this is one file" if os.path.isfile(path) else
                    f"rank_0 .. rank_{last} in this folder, it has none")
            raise UserError(f"auto_trans_ckpt False wants {what}", where=f"load_checkpoint {path}",
                            fix="Pass --auto_trans_ckpt True to slice it while loading, or slice it once with transform_ckpt.py.")
        return path
    found = len(slices)
    if list(slices) != list(range(found)):
        absent = sorted(set(range(max(slices) + 1)) - set(slices))
        raise UserError(f"rank folders are not complete: rank_{absent[0]} is missing", where=f"load_checkpoint {path}",
                        fix=f"Copy all of rank_0 .. rank_{max(slices)}.")
    if found == 1 and (whole or ranks == 1):
        return slices[0]
    if ranks == 1:
        raise UserError(f"this checkpoint is sliced for {found} ranks and the run has one", where=f"load_checkpoint {path}",
                        fix=f"Run {found} workers (model_parallel: {found}), or merge it with transform_ckpt.py.")
    if whole and found == ranks:
        raise UserError(f"auto_trans_ckpt True wants a whole checkpoint, this one is sliced for {found} ranks already",
                        where=f"load_checkpoint {path}", fix="Pass --auto_trans_ckpt False.")
    if found != ranks:
        raise UserError(f"this checkpoint is sliced for {found} ranks, model_parallel is {ranks}",
                        where=f"load_checkpoint {path}", fix=f"Run {found} workers, or slice again with transform_ckpt.py.")
    return slices[rank]


def _nearest(path: str) -> Optional[str]:
    parent = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(parent):
        return f"The folder {parent} does not exist either."
    names = ", ".join(sorted(os.listdir(parent))[:5]) or "nothing"
    return f"{parent} holds: {names}."


class Source:
    """Gives parameters their values by MindSpore name, and keeps the account.

    Args:
        checkpoint: what `resolve` returned.
        model: the model's configuration; `param_init_type` is the dtype of the matrices.
        held_dtype: dtype in which matrices are handed out by `__call__`.
        rank, ranks, vocab_emb_dp: the slices to take.
        whole: the checkpoint holds whole tensors; otherwise this rank's slices.

    Raises:
        UserError: missing, unexpected or misshapen tensors, before any is read.
    """

    def __init__(self, checkpoint: str, model: ModelConfig, held_dtype: str, rank: int = 0, ranks: int = 1,
                 vocab_emb_dp: bool = True, whole: bool = True):
        self._path = checkpoint
        self._reader = open_checkpoint(checkpoint)
        self._matrix_dtype = model.param_init_type
        self._held_dtype = held_dtype
        self._rank, self._ranks, self._whole = rank, ranks, whole
        self._axes: Dict[str, Optional[int]] = {}
        self._stored: Dict[str, str] = {}
        self._skipped: Dict[str, List[str]] = {}
        self._casts: Dict[Tuple[str, str], casting.Count] = {}
        self._loaded, self._tied, self._mapped_bytes, self._copied_bytes = 0, 0, 0, 0
        self._check(model.dims, vocab_emb_dp)

    def _check(self, dims: Dims, vocab_emb_dp: bool) -> None:
        infos = self._reader.infos
        expected = {w.ms: w for w in naming.weights(dims)}
        surplus = []
        for stored in infos:
            name = naming.hf_to_ms(stored) or stored
            if name in expected:
                if name in self._stored:
                    raise UserError(f"holds both {self._stored[name]} and {stored}, names of the same weight", self._path)
                self._stored[name] = stored
            elif name == naming.HEAD.ms and dims.tie_word_embeddings:
                self._tied = 1  # looked at below, once the embedding is known to be there
            else:
                surplus.append(stored)
        self._skipped, unexpected = leftovers.sort_out(surplus, self._reader.others)
        self._check_shapes(dims, expected, vocab_emb_dp)
        missing = [name for name in expected if name not in self._stored]
        if missing:
            hint = "The checkpoint is not complete, or not of this model."
            if missing == [naming.HEAD.ms]:
                hint = "Models that share it with the embedding need tie_word_embeddings: True."
            raise UserError(f"{len(missing)} of {len(expected)} weights are missing, the first is {missing[0]}", self._path, hint)
        if unexpected:
            raise UserError(f"{len(unexpected)} tensors belong to no weight of this model, the first is {unexpected[0]}",
                            self._path, _unexpected_hint(unexpected[0], dims))
        if self._tied:
            self._check_tied_head()

    def _check_shapes(self, dims: Dims, expected: Dict[str, naming.Weight], vocab_emb_dp: bool) -> None:
        for name, weight in expected.items():
            self._axes[name] = weight.axis(self._ranks, vocab_emb_dp)
            if name not in self._stored:
                continue
            found = self._reader.infos[self._stored[name]].shape
            wanted = weight.shape if self._whole else weight.slice_shape(self._ranks, vocab_emb_dp)
            if tuple(found) != wanted:
                raise UserError(self._misshapen(weight, tuple(found), wanted, dims, vocab_emb_dp), self._path)

    def _misshapen(self, weight: naming.Weight, found: Tuple[int, ...], wanted: Tuple[int, ...], dims: Dims,
                   vocab_emb_dp: bool) -> str:
        line = f"{weight.ms} has shape {found}, the YAML wants {wanted}"
        if not self._whole:
            for parts in (1, 2, 4, 8, 16):
                for split in (True, False):
                    if parts != self._ranks and weight.axis(parts, split) is not None and \
                            found == weight.slice_shape(parts, split):
                        return f"{line}: this slice was cut for {parts} ranks, not {self._ranks}"
            if found == weight.slice_shape(self._ranks, not vocab_emb_dp):
                return f"{line}: it was sliced with vocab_emb_dp {not vocab_emb_dp}, the run has {vocab_emb_dp}"
        sizes = {"num_layers": sum(1 for name in self._stored if name.endswith(".attention_norm.weight"))}
        embedding = self._stored.get(naming.EMBEDDING.ms)
        if embedding and self._whole:
            sizes["vocab_size"], sizes["hidden_size"] = self._reader.infos[embedding].shape
        theirs, ours = family.looks_like(sizes), family.looks_like(_telling(dims))
        if theirs and theirs != ours:
            line = f"{line}: the checkpoint looks like Qwen1.5-{theirs}" + (f", not {ours}" if ours else "")
        return line

    def _check_tied_head(self) -> None:
        """A checkpoint of a tied model may hold the head as well, but then it must be the embedding."""
        head = next(stored for stored in self._reader.infos if (naming.hf_to_ms(stored) or stored) == naming.HEAD.ms)
        one, other = (self._reader.read(name) for name in (head, self._stored[naming.EMBEDDING.ms]))
        if one.dtype != other.dtype or one.shape != other.shape or not np.array_equal(one.view(np.uint8), other.view(np.uint8)):
            raise UserError(f"{head} differs from the embedding, and tie_word_embeddings: True would ignore it", self._path,
                            "Set tie_word_embeddings: False.")

    def __call__(self, name: str):
        """The value of parameter `name` as a MindSpore Tensor: this rank's slice, mapped from the file where it can be."""
        array, dtype = self.read(name)
        if array.ndim == 1:
            # Norm weights and biases take part in float32 arithmetic everywhere; holding them so is exact.
            array, dtype = casting.exact(array, dtype, "F32"), "F32"
        else:
            held = SHORT_NAMES[self._held_dtype]
            array, dtype = casting.exact(array, dtype, held), held
        return casting.to_tensor(array, dtype)

    def read(self, name: str) -> Tuple[np.ndarray, str]:
        """This rank's slice of parameter `name` in the model's dtype: (array, 'F32' | 'F16' | 'BF16')."""
        stored, axis = self._stored[name], self._axes[name]
        info = self._reader.infos[stored]
        if self._whole and axis is not None:
            size = info.shape[axis] // self._ranks
            array = self._reader.read(stored, axis, self._rank * size, (self._rank + 1) * size)
        else:
            array = self._reader.read(stored)
        wanted = info.dtype if array.ndim == 1 else SHORT_NAMES[self._matrix_dtype]
        if wanted != info.dtype:
            array, count = casting.cast(array, info.dtype, wanted)
            key = (info.dtype, wanted)
            self._casts[key] = self._casts[key] + count if key in self._casts else count
        self._loaded += 1
        return array, wanted

    def account(self) -> str:
        """One line for the user: what was loaded, tied, cast and skipped."""
        line = f"weights: loaded {self._loaded} of {len(self._stored)}, missing 0, unexpected 0"
        if self._tied:
            line += ", tied 1 (head = embedding)"
        skipped = ", ".join(leftovers.account(self._skipped))
        line += f", skipped {sum(map(len, self._skipped.values()))}" + (f": {skipped}" if skipped else "")
        for (source, target), count in self._casts.items():
            line += f"; {LONG_NAMES.get(source, source)} -> {LONG_NAMES[target]}: {count}"
        return line

    def find_non_finite(self) -> Optional[str]:
        """Name of the first weight that holds NaN or infinity, None when all are finite. Reads every weight."""
        for name, stored in self._stored.items():
            if casting.has_non_finite(self._reader.read(stored), self._reader.infos[stored].dtype):
                return name
        return None


def _telling(dims: Dims) -> Dict[str, int]:
    return {"hidden_size": dims.hidden_size, "intermediate_size": dims.intermediate_size, "num_layers": dims.num_layers}


def _unexpected_hint(name: str, dims: Dims) -> str:
    if "w_qkv" in name or "w_gate_hidden" in name:
        return "It was converted with qkv_concat; convert it again from Hugging Face without."
    layer = re.search(r"layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= dims.num_layers:
        return f"The checkpoint has more layers than num_layers: {dims.num_layers}."
    if "lora" in name:
        return "Merge LoRA adapters into the weights first."
    return "Is this the checkpoint of a Qwen1.5 or Qwen2 model?"
