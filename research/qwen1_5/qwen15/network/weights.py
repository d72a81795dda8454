"""Checkpoint -> parameters, strictly: every key accounted for, every shape checked, only this rank's slices read."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Callable, Dict, Optional, Set, Tuple

import numpy as np

from .. import device, naming
from ..checkpoint import casting, leftovers, origin
from ..checkpoint.account import FOREIGN_QUANTISED, Expected, take_account
from ..checkpoint.origin import Likeness
from ..checkpoint.quantised import ORDER, SCALE, ZERO, Scheme, checked_order, companion_of
from ..checkpoint.quantised_settings import settings_of
from ..checkpoint.quantised_source import read_quantised
from ..checkpoint.reader import Checkpoint, all_ranks, folder_of
from ..checkpoint.regrouped import finer, regrouped
from ..checkpoint.source import open_source
from ..checkpoint.tensors import LONG_NAMES, SHORT_NAMES, TensorInfo
from ..config.schema import Config, ModelConfig, Quantization
from ..errors import UserError
from .weight_quant import QuantisedMatrix


def resolve(path: Optional[str], rank: int = 0, ranks: int = 1, whole: bool = True) -> str:
    """The file or folder from which this rank reads its weights.

    Args:
        path: `load_checkpoint`: a file, a folder of files, or a folder with rank_0 .. rank_N-1.
        rank, ranks: this process among the tensor-parallel ones.
        whole: `auto_trans_ckpt`: the checkpoint is whole and every rank cuts its own slices; otherwise it is sliced
            already.

    Raises:
        UserError: there is nothing there, or something else than this run needs; says what was found and what is
            expected.
    """
    if not path:
        raise UserError("no checkpoint is given", where="load_checkpoint",
                        fix="Set load_checkpoint in the YAML or pass --load_checkpoint.")
    if not os.path.exists(path):
        raise UserError("no such file or folder", where=f"load_checkpoint {path}", fix=_nearest(path))
    slices = all_ranks(path)
    if not slices:
        if ranks > 1 and not whole:
            last = ranks - 1
            what = (f"a folder with rank_0 .. rank_{last}, this is one file" if os.path.isfile(path) else
                    f"rank_0 .. rank_{last} in this folder, it has none")
            raise UserError(f"auto_trans_ckpt False wants {what}", where=f"load_checkpoint {path}",
                            fix="Pass --auto_trans_ckpt True to slice it while loading, or slice it once with "
                                "transform_ckpt.py.")
        return path
    found = len(slices)
    if found == 1 and (whole or ranks == 1):
        return slices[0]
    if ranks == 1:
        raise UserError(f"this checkpoint is sliced for {found} ranks and the run has one",
                        where=f"load_checkpoint {path}",
                        fix=f"Run {found} workers (model_parallel: {found}), or merge it with transform_ckpt.py.")
    if whole and found == ranks:
        raise UserError(f"auto_trans_ckpt True wants a whole checkpoint, this one is sliced for {found} ranks already",
                        where=f"load_checkpoint {path}", fix="Pass --auto_trans_ckpt False.")
    if found != ranks:
        raise UserError(f"this checkpoint is sliced for {found} ranks, model_parallel is {ranks}",
                        where=f"load_checkpoint {path}",
                        fix=f"Run {found} workers, or slice again with transform_ckpt.py.")
    return slices[rank]


def resolve_for(config: Config, rank: Optional[int] = None) -> str:
    """`resolve` for a rank of this run; for this process without one."""
    parallel = config.parallel
    return resolve(config.load_checkpoint, this_rank(config) if rank is None else rank, parallel.model_parallel,
                   config.auto_trans_ckpt)


def this_rank(config: Config) -> int:
    """This process' rank as the launcher has set it; 0 where nothing is parallel."""
    return device.env_rank() if config.parallel.use_parallel else 0


def _nearest(path: str) -> Optional[str]:
    parent = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(parent):
        return f"The folder {parent} does not exist either."
    names = ", ".join(sorted(os.listdir(parent))[:5]) or "nothing"
    return f"{parent} holds: {names}."


def is_quantised(path: str) -> bool:
    """Whether a checkpoint (as `resolve` found it) holds integers, by its headers."""
    with open_source(path) as checkpoint:
        return any(companion_of(name) is not None or name.endswith(_FOREIGN) for name in checkpoint.infos)


def open_weights(path: str, dims: naming.Dims) -> Tuple[Checkpoint, str]:
    """A checkpoint (as `resolve` found it), or a GPTQ, AWQ or compressed-tensors folder in this project's stored form.

    Returns:
        The checkpoint, and what to say of zero points that its writer may have damaged, '' for nothing.

    Raises:
        UserError: it is damaged, or quantised in a way that is not read.
    """
    source = open_source(path)
    if not any(FOREIGN_QUANTISED.search(name) or info.dtype.startswith("F8") for name, info in source.infos.items()):
        return source, ""
    settings = settings_of(folder_of(path))
    if settings is None:
        return source, ""
    found = read_quantised(source, settings, naming.weights(dims))
    return found.view, found.doubt


_FOREIGN = (".qweight", ".weight_packed")
"""How tensors of GPTQ, AWQ and compressed-tensors end that hold integers."""


class Loader:
    """Gives parameters their values by MindSpore name, and keeps the account.

    Args:
        checkpoint: what `resolve` returned.
        model: the model's configuration; `param_init_type` is the dtype of the matrices, where none is quantised.
        rank, ranks, vocab_emb_dp: the slices to take.
        whole: the checkpoint holds whole tensors; otherwise this rank's slices.
        held_dtype: the dtype in which `__call__` hands out an unquantised matrix of a dtype: the same, or float32.

    Attributes:
        schemes: MindSpore name -> how this rank's slice of it is quantised, for the matrices that are.

    Raises:
        UserError: missing, unexpected or misshapen tensors, before any is read.
    """

    @classmethod
    def of(cls, config: Config, checkpoint: str, rank: int, held_dtype: Callable[[str], str] = lambda dtype: dtype
           ) -> Loader:
        """What loads the weights of a rank of this run."""
        parallel = config.parallel
        return cls(checkpoint, config.model, rank, parallel.model_parallel, parallel.vocab_emb_dp,
                   config.auto_trans_ckpt or parallel.model_parallel == 1, held_dtype)

    def __init__(self, checkpoint: str, model: ModelConfig, rank: int = 0, ranks: int = 1, vocab_emb_dp: bool = True,
                 whole: bool = True, held_dtype: Callable[[str], str] = lambda dtype: dtype):
        self._path = checkpoint
        self._reader, self._doubt = open_weights(checkpoint, model.dims)
        self._matrix_dtype = model.param_init_type
        self._operators_hold, self._compute_dtype = held_dtype, model.compute_dtype
        self._rank, self._ranks, self._whole = rank, ranks, whole
        self._dims, self._vocab_emb_dp = model.dims, vocab_emb_dp
        self._axes = {weight.ms: weight.axis(ranks, vocab_emb_dp) for weight in naming.weights(model.dims)}
        self._casts: Dict[Tuple[str, str], casting.Count] = {}
        self._loaded = 0
        self._account = take_account(
            self._reader, Expected(model.dims, "the YAML", "either", 1 if whole else ranks, vocab_emb_dp))
        if not whole:
            origin.check_place(self._reader, rank, ranks)
        self._stored = self._account.stored
        self._shapes = {weight.ms: weight.shape for weight in naming.weights(model.dims)}
        if model.quantization is not None:
            self._compare(model.quantization)
        self.schemes = self._cut_schemes() if whole else dict(self._account.schemes)

    def likeness(self) -> Likeness:
        """What every rank has to hold alike, of this one: records of the source, and the weights that are not cut."""
        return Likeness.of(self._reader, {name: self._stored[name] for name, axis in self._axes.items()
                                          if axis is None and name not in self.schemes})

    def _compare(self, said: Quantization) -> None:
        """Refuse a configuration that says something else about the layers' matrices than the checkpoint does."""
        for name, shape in self._shapes.items():
            if len(shape) != 2 or name in (naming.EMBEDDING.ms, naming.HEAD.ms):
                continue
            scheme = self._account.schemes.get(name)
            found = "not quantised" if scheme is None else _in_words(scheme)
            whole_rows = said.group_size is not None and said.group_size <= 0
            fix = "Correct or remove model.model_config.quantization_config, or give the checkpoint that it describes."
            if said.weight_dtype is not None and (scheme is None or said.weight_dtype != f"int{scheme.bits}"):
                raise UserError(f"quantization_config.weight_dtype {said.weight_dtype}, but {name} in {self._path} is "
                                f"{found}", said.where["weight_dtype"], fix)
            if said.group_size is not None and self._whole and (
                    scheme is None or (scheme.groups != 1 if whole_rows else scheme.group_size != said.group_size)):
                raise UserError(f"quantization_config.group_size {said.group_size}, but {name} in {self._path} is "
                                f"{found}", said.where["group_size"], fix)

    def _cut_schemes(self) -> Dict[str, Scheme]:
        """How this rank's slices are quantised; a cut that falls inside a group makes finer groups, scales repeated."""
        mine, changed = dict(self._account.schemes), {}
        for name, scheme in self._account.schemes.items():
            if self._axes[name] != 1:
                continue
            inputs = self._shapes[name][1]
            cut = finer(scheme, name, inputs, self._ranks, self._path)
            changed[self._stored[name]] = scheme, cut
            mine[name] = replace(cut, groups=cut.groups // self._ranks)
        self._reader = regrouped(self._reader, changed)
        return mine

    def _held_dtype(self, dtype: str) -> str:
        """The dtype in which an unquantised matrix of `dtype` is handed out."""
        if self.schemes and self._compute_dtype == "float32" and dtype == "bfloat16":
            return "float32"  # exact; a bfloat16 dot product would round the activations, which nobody asked for
        return self._operators_hold(dtype)

    def parts(self, name: str) -> Tuple[str, ...]:
        """The parameters that weight `name` consists of: itself, and its companions where it is quantised."""
        if name not in self.schemes:
            return (name,)
        return tuple(info.name for info in self.schemes[name].infos(name, self._shapes[name]))

    def __call__(self, name: str):
        """The value of parameter `name` as a Tensor: this rank's slice, mapped from the file where it can be."""
        matrix = companion_of(name) or name
        if matrix in self.schemes:
            return casting.to_tensor(*self._read_quantised(matrix, name[len(matrix):]))
        array, dtype = self.read(name)
        if array.ndim == 1:
            # Norm weights and biases enter float32 arithmetic everywhere; storing them as float32 is exact.
            array, dtype = casting.exact(array, dtype, "F32"), "F32"
        else:
            held = SHORT_NAMES[self._held_dtype(LONG_NAMES[dtype])]
            array, dtype = casting.exact(array, dtype, held), held
        return casting.to_tensor(array, dtype)

    def _read_quantised(self, matrix: str, suffix: str) -> Tuple[np.ndarray, str]:
        """This rank's slice of one tensor of a quantised matrix, bit for bit as it is stored."""
        axis = None if suffix == ORDER else self._axes[matrix]
        self._loaded += not suffix
        stored = self._stored[matrix] + suffix
        array = self._slice(stored, axis)
        if suffix == ORDER:
            array = checked_order(array, self._stored[matrix], self._path)
        return array, self._reader.infos[stored].dtype

    def read_quantised(self, name: str) -> QuantisedMatrix:
        """This rank's slice of a quantised matrix, bit for bit as it is stored."""
        scheme = self.schemes[name]
        weight, _ = self._read_quantised(name, "")
        scale, dtype = self._read_quantised(name, SCALE)
        zero, order = (self._read_quantised(name, suffix)[0] if there else None
                       for suffix, there in ((ZERO, scheme.has_zero), (ORDER, scheme.has_order)))
        return QuantisedMatrix(weight, scale, dtype, zero, order)

    def _slice(self, stored: str, axis: Optional[int]) -> np.ndarray:
        """This rank's part of a tensor along `axis`, None for the whole."""
        if not self._whole or axis is None:
            return self._reader.read(stored)
        size = self._reader.infos[stored].shape[axis] // self._ranks
        return self._reader.read(stored, axis, self._rank * size, (self._rank + 1) * size)

    def read(self, name: str) -> Tuple[np.ndarray, str]:
        """This rank's slice of an unquantised weight: (array, 'F32' | 'F16' | 'BF16').

        Matrices are in the model's dtype; beside quantised ones they are as they are stored, since those do not follow
        `param_init_type` either.
        """
        stored, axis = self._stored[name], self._axes[name]
        info = self._reader.infos[stored]
        array = self._slice(stored, axis)
        wanted = info.dtype if array.ndim == 1 or self.schemes else SHORT_NAMES[self._matrix_dtype]
        if wanted != info.dtype:
            array, count = casting.cast(array, info.dtype, wanted)
            key = (info.dtype, wanted)
            self._casts[key] = self._casts[key] + count if key in self._casts else count
        self._loaded += 1
        return array, wanted

    def describe(self) -> str:
        """How the matrices are held, for people: `bfloat16`, or `int4 in groups of 64, table and head float16`."""
        if not self.schemes:
            return self._held_dtype(self._matrix_dtype)
        layers: Set[str] = set()
        vocabulary: Set[str] = set()
        for name, shape in self._shapes.items():
            if len(shape) == 2:
                kinds = vocabulary if name in (naming.EMBEDDING.ms, naming.HEAD.ms) else layers
                scheme = self._account.schemes.get(name)
                stored = LONG_NAMES[self._reader.infos[self._stored[name]].dtype] if scheme is None else ""
                kinds.add(_in_words(scheme) if scheme else self._held_dtype(stored))
        ours, theirs = " and ".join(sorted(layers)), " and ".join(sorted(vocabulary))
        return ours if ours == theirs else f"{ours}, table and head {theirs}"

    def nbytes(self) -> Tuple[int, int]:
        """Bytes that this rank holds: (table and head, everything else)."""
        vocabulary = others = 0
        for weight in naming.weights(self._dims):
            shape = weight.slice_shape(self._ranks, self._vocab_emb_dp)
            if weight.ms in self.schemes:
                size = sum(info.nbytes for info in self.schemes[weight.ms].infos(weight.ms, shape))
            else:
                stored = LONG_NAMES[self._reader.infos[self._stored[weight.ms]].dtype]
                matrix_dtype = stored if self.schemes else self._matrix_dtype
                dtype = "float32" if len(shape) == 1 else self._held_dtype(matrix_dtype)
                size = TensorInfo.of(weight.ms, SHORT_NAMES[dtype], shape).nbytes
            if weight.cut == naming.VOCAB:
                vocabulary += size
            else:
                others += size
        return vocabulary, others

    def account(self) -> str:
        """One line for the user: what was loaded, tied, cast and skipped."""
        line = f"weights: loaded {self._loaded} of {len(self._stored)}, missing 0, unexpected 0"
        if self._account.tied_head is not None:
            line += ", tied 1 (head = embedding)"
        skipped = self._account.left_out
        phrases = ", ".join(leftovers.account(skipped))
        line += f", skipped {sum(map(len, skipped.values()))}" + (f": {phrases}" if phrases else "")
        for (source, target), count in self._casts.items():
            line += f"; {LONG_NAMES.get(source, source)} -> {LONG_NAMES[target]}: {count}"
        return f"{line}; {self._doubt}" if self._doubt else line

    def find_non_finite(self) -> Optional[str]:
        """Name of the first weight that holds NaN or infinity, None when all are finite. Reads every weight."""
        for name, stored in self._stored.items():
            floats = stored + SCALE if name in self.schemes else stored
            if any(casting.non_finite(self._reader.read(floats), self._reader.infos[floats].dtype)):
                return name
        return None


def _in_words(scheme: Scheme) -> str:
    return f"int{scheme.bits} in " + ("whole rows" if scheme.groups == 1 else f"groups of {scheme.group_size}")
