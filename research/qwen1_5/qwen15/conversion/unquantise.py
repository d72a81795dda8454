"""Out of the stored form: floats, or the tensors that a quantised checkpoint was converted from, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Callable, Mapping, Sequence

import numpy as np

from ..checkpoint.account import Account
from ..checkpoint.casting import from_float32
from ..checkpoint.quantised import ORDER, Scheme, checked_order
from ..checkpoint.quantised_layouts import INTEGERS, SUFFIXES, Linear, Writer
from ..checkpoint.quantised_settings import QuantizationConfig
from ..checkpoint.quantised_source import QuantisedSource
from ..checkpoint.reader import Checkpoint
from ..checkpoint.regrouped import Joined, regrouped
from ..checkpoint.tensors import NUMPY_DTYPES, TensorInfo
from ..checkpoint.view import Made, View, block_of
from ..errors import UserError
from ..json_file import read_json
from ..naming import EMBEDDING, HEAD, Weight, hf_to_ms
from .quantise import dense_rows
from .slices import Slicing

_VERSION = 1
_WORK_FACTOR = 12
"""Bytes for each value while it is dequantised: float32s and integers."""


def merged(ranks: Sequence[Checkpoint], slicing: Slicing, account: Account, weights: Sequence[Weight]
           ) -> tuple[Checkpoint, dict[str, Scheme]]:
    """The slices of a quantised checkpoint as one, and how its matrices are stored."""
    if len(ranks) == 1:
        return ranks[0], dict(account.schemes)
    axes, schemes = {}, {}
    for weight in weights:
        axis = slicing.axis(weight)
        axes[weight.ms] = axis
        if weight.ms in account.schemes:
            scheme = account.schemes[weight.ms]
            schemes[weight.ms] = replace(scheme, groups=scheme.groups * slicing.parts) if axis == 1 else scheme
            for info in scheme.infos(weight.ms, weight.shape)[1:]:
                axes[info.name] = None if info.name.endswith(ORDER) else axis
    return Joined(list(ranks), axes), schemes


def dequantised(source: Checkpoint, schemes: Mapping[str, Scheme], weights: Sequence[Weight], dtype: str) -> View:
    """A whole checkpoint with floats of `dtype` ('BF16', 'F16', 'F32') in place of quantised matrices."""
    made: dict[str, Made] = {}
    hidden: set[str] = set()
    for weight in weights:
        if weight.ms in schemes:
            scheme = schemes[weight.ms]
            made[weight.ms] = Made(TensorInfo.of(weight.ms, dtype, weight.shape),
                                   _floats(source, weight.ms, scheme, dtype), _WORK_FACTOR * weight.shape[1])
            hidden.update(info.name for info in scheme.infos(weight.ms, weight.shape)[1:])
    return View(source, made, frozenset(hidden))


def _floats(source: Checkpoint, name: str, scheme: Scheme, dtype: str) -> Callable[[int, int], np.ndarray]:
    def rows(first: int, last: int) -> np.ndarray:
        order = checked_order(source.read(name + ORDER), name, source.path) if scheme.has_order else None
        return from_float32(dense_rows(source, name, scheme, first, last, order)[0], dtype)

    return rows


# ---- the original ----

def describe_layout(source: Checkpoint, settings: QuantizationConfig, found: QuantisedSource) -> bytes:
    """What is put beside a converted checkpoint, so that `original` can make the source's tensors again."""
    names = set(found.view.infos) - set(found.view.made)
    names |= {f"{linear.base}.{suffix}" for linear in found.linears for suffix in SUFFIXES} | set(found.zero_biases)
    tensors = {name: [info.dtype, list(info.shape)] for name, info in source.infos.items() if name in names}
    content = {"version": _VERSION, "layout": settings.layout, "bits": settings.bits, "group_size": settings.group_size,
               "gptq_version": settings.version, "zeros_borrow": settings.borrows,
               "zero_biases": list(found.zero_biases), "tensors": tensors}
    return (json.dumps(content, indent=1) + "\n").encode("utf-8")


def original(source: Checkpoint, schemes: Mapping[str, Scheme], weights: Sequence[Weight], layout_path: str
             ) -> tuple[View, list[TensorInfo]]:
    """A whole checkpoint seen as what it was converted from.

    Returns:
        The view, in which tensors that were quantised have their own names and all others MindSpore's, and every tensor
        of the original under its name.

    Raises:
        UserError: the description is damaged, or of another checkpoint.
    """
    described = _read_description(layout_path)
    settings = QuantizationConfig(described["layout"], described["bits"], described["group_size"],
                                  described["gptq_version"], layout_path,
                                  borrows=described.get("zeros_borrow") is True)
    by_name = {weight.hf: weight for weight in weights}
    infos = [TensorInfo.of(name, dtype, tuple(shape)) for name, (dtype, shape) in described["tensors"].items()]
    grouped, coarse = _original_groups(source, schemes, weights, settings)
    made: dict[str, Made] = {}
    kept = []
    for info in infos:
        base, _, suffix = info.name.rpartition(".")
        weight = by_name.get(f"{base}.weight")
        if suffix in SUFFIXES and weight is not None and weight.ms in coarse:
            linear = Linear(base, *weight.shape)
            writer = Writer(grouped, weight.ms, settings, linear, coarse[weight.ms])
            made[info.name] = Made(info, _of_writer(writer, suffix, info))
        elif info.name in described["zero_biases"]:
            made[info.name] = Made(info, _zeros(info))
        elif info.name == HEAD.hf and HEAD.ms not in source.infos:  # a tied one, which is the embedding again
            made[info.name] = Made(info, _copy_of(source, EMBEDDING.ms))
        elif hf_to_ms(info.name) not in source.infos:
            continue  # an entry that was left out when converting, and told then
        else:
            stored = source.infos[str(hf_to_ms(info.name))]
            if stored.shape != info.shape:
                raise _other(layout_path, f"{info.name} {list(info.shape)}, the checkpoint has {list(stored.shape)}")
            info = TensorInfo.of(info.name, stored.dtype, stored.shape)
        kept.append(info)
    integers = {f"{weight.hf[:-len('.weight')]}.{INTEGERS[settings.layout]}"
                for weight in weights if weight.ms in schemes}
    if integers - set(made):
        raise _other(layout_path, f"nothing about {sorted(integers - set(made))[0]}")
    return View(grouped, made), kept


def _original_groups(source: Checkpoint, schemes: Mapping[str, Scheme], weights: Sequence[Weight],
                     settings: QuantizationConfig) -> tuple[Checkpoint, dict[str, Scheme]]:
    """The groups as they were before slicing made them finer."""
    coarse, changes = {}, {}
    for weight in weights:
        if weight.ms in schemes:
            old = schemes[weight.ms]
            group_size = settings.group_size or weight.shape[1]
            if old.bits != settings.bits or group_size % old.group_size:
                raise _other(settings.where, f"{settings.bits} bits in groups of {group_size}; {weight.ms} is {old}")
            coarse[weight.ms] = replace(old, groups=weight.shape[1] // group_size, group_size=group_size)
            changes[weight.ms] = (old, coarse[weight.ms])
    return regrouped(source, changes), coarse


def _of_writer(writer: Writer, suffix: str, info: TensorInfo) -> Callable[[int, int], np.ndarray]:
    dtype = NUMPY_DTYPES[info.dtype]
    return lambda first, last: writer.rows(suffix, first, last).astype(dtype, copy=False)


def _copy_of(source: Checkpoint, name: str) -> Callable[[int, int], np.ndarray]:
    return lambda first, last: block_of(source, name, (first, last), (0, source.infos[name].shape[1]))


def _zeros(info: TensorInfo) -> Callable[[int, int], np.ndarray]:
    return lambda first, last: np.zeros((last - first, *info.shape[1:]), NUMPY_DTYPES[info.dtype])


def _read_description(path: str) -> Any:
    described = read_json(path)
    keys = {"version", "layout", "bits", "group_size", "gptq_version", "zero_biases", "tensors"}
    if not isinstance(described, dict) or set(described) - {"zeros_borrow"} != keys or \
            described["version"] != _VERSION or described["layout"] not in INTEGERS or \
            not isinstance(described["tensors"], dict):
        raise UserError("does not describe a quantised checkpoint", path,
                        "Convert the quantised checkpoint again, or use --dequantize.")
    return described


def _other(path: str, what: str) -> UserError:
    return UserError(f"describes another checkpoint: it says {what}", path, "Use --dequantize, or convert again.")
