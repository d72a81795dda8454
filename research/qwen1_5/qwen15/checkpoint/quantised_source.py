"""A GPTQ, AWQ or compressed-tensors checkpoint seen in the stored form, under Hugging Face's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Mapping, Optional

import numpy as np

from ..errors import UserError
from ..naming import EMBEDDING, Weight
from .casting import FLOATS, to_float32
from .quantised import BLOCK, MIDDLE, ORDER, SCALE, ZERO, Scheme
from .quantised_layouts import (
    GROUP_INDEX,
    INTEGERS,
    SCALES,
    SUFFIXES,
    ZEROS,
    LayoutReader,
    Linear,
    order_of,
    shapes,
)
from .quantised_settings import QuantizationConfig
from .quantised_words import overflowing_words
from .reader import Checkpoint
from .tensors import TensorInfo
from .view import Made, View

_FIX = "Download the checkpoint again, config.json and all weight files from one model."
_LOOKED_AT_ROWS = 4096


@dataclass(frozen=True)
class QuantisedSource:
    """What was found.

    Attributes:
        view: the checkpoint in the stored form.
        linears: that are quantised.
        zero_biases: names of stored biases that are zero and that the network does not have.
        doubtful: tensor of zero points -> in how many of its words writers of this layout do not agree.
    """

    view: View
    linears: tuple[Linear, ...]
    zero_biases: tuple[str, ...]
    doubtful: Mapping[str, int]

    @property
    def doubt(self) -> str:
        """What to say of zero points that the checkpoint's writer may have damaged; '' where nobody doubts them."""
        if not self.doubtful:
            return ""
        return (f"{sum(self.doubtful.values())} words of zero points (first in {next(iter(self.doubtful))}) hold a 0 "
                "before others: AutoGPTQ overwrites the others then, and readers differ. Each is read by itself, all "
                "ones as 0; rather take this model as gptq_v2, or symmetric")


def read_quantised(source: Checkpoint, settings: QuantizationConfig, weights: Iterable[Weight]) -> QuantisedSource:
    """See a foreign checkpoint in the stored form. Reads group indices, zero points and the biases that should be zero.

    Args:
        source: the checkpoint.
        settings: what its config.json says.
        weights: of the model.

    Raises:
        UserError: a tensor is missing, has the wrong shape or contradicts the settings.
    """
    made: dict[str, Made] = {}
    hidden: set[str] = set()
    linears, zero_biases = [], []
    doubtful: dict[str, int] = {}
    needed = {weight.hf: weight for weight in weights}
    for weight in needed.values():
        if len(weight.shape) != 2 or not weight.hf.endswith(".weight"):
            continue
        linear = Linear(weight.hf[:-len(".weight")], *weight.shape)
        parts = [suffix for suffix in SUFFIXES if f"{linear.base}.{suffix}" in source.infos]
        if not parts:
            continue
        if weight.hf == EMBEDDING.hf and settings.bits != 8:
            raise UserError(f"{linear.base}.{parts[0]}: an embedding table of {settings.bits} bits is not supported",
                            source.path, "Take a checkpoint whose embedding is left unquantised.")
        if linear.weight in source.infos:
            raise UserError(f"holds {linear.weight} and {linear.base}.{parts[0]}, the same weight twice", source.path,
                            _FIX)
        for tensor in _made(source, settings, linear, parts):
            made[tensor.info.name] = tensor
        hidden.update(f"{linear.base}.{suffix}" for suffix in parts)
        linears.append(linear)
        if settings.version == 1 and not settings.borrows:
            zeros = f"{linear.base}.{ZEROS[settings.layout]}"
            doubtful[zeros] = overflowing_words(source.read(zeros), settings.bits)
        bias = f"{linear.base}.bias"
        if bias in source.infos and bias not in needed:
            _refuse_bias(source, bias)
            zero_biases.append(bias)
    view = View(source, made, frozenset(hidden | set(zero_biases)))
    return QuantisedSource(view, tuple(linears), tuple(zero_biases),
                           {name: count for name, count in doubtful.items() if count})


def _made(source: Checkpoint, settings: QuantizationConfig, linear: Linear, parts: list[str]) -> list[Made]:
    """One linear's tensors in the stored form."""
    scheme, order = _scheme(source, settings, linear, parts)
    reader = LayoutReader(source, settings, linear, scheme, order)
    if ZEROS[settings.layout] in parts and not _all_middle(reader):
        scheme = Scheme(scheme.bits, scheme.groups, scheme.group_size, scheme.scale_dtype, True, scheme.has_order)
        reader = LayoutReader(source, settings, linear, scheme, order)
    rows = {"": reader.integers, SCALE: reader.scale, ZERO: reader.zero}
    if order is not None:
        rows[ORDER] = lambda first, last: order[first:last]
    infos = scheme.infos(linear.weight, (linear.outputs, linear.inputs))
    return [Made(info, rows[info.name[len(linear.weight):]]) for info in infos]


def _scheme(source: Checkpoint, settings: QuantizationConfig, linear: Linear, parts: list[str]
            ) -> tuple[Scheme, Optional[np.ndarray]]:
    layout = settings.layout
    required = {INTEGERS[layout]: layout, SCALES[layout]: layout}
    if layout != "compressed-tensors" or settings.has_zero:
        required[ZEROS[layout]] = "asymmetric" if layout == "compressed-tensors" else layout
    if settings.has_order:
        required[GROUP_INDEX[layout]] = "desc_act" if layout == "gptq" else "actorder"
    for suffix, said in required.items():
        if suffix not in parts:
            raise UserError(f"{linear.base}.{suffix} is missing, {linear.base}.{parts[0]} is there "
                            f"({settings.where} says {said})", source.path, _FIX)
    group_size = settings.group_size or linear.inputs
    if linear.inputs % BLOCK or linear.inputs % group_size:
        raise UserError(f"{linear.weight} has {linear.inputs} inputs, not a multiple of "
                        f"{group_size if linear.inputs % group_size else BLOCK} (group_size in {settings.where})",
                        source.path, _FIX)
    groups = linear.inputs // group_size
    wanted = shapes(settings, linear, groups)
    for suffix in parts:
        info = source.infos[f"{linear.base}.{suffix}"]
        if suffix not in wanted:
            raise UserError(f"{info.name} does not belong to {layout}, which {settings.where} names", source.path, _FIX)
        if suffix == "weight_zero_point" and info.dtype == "I8":
            raise UserError(f"{info.name} is I8: zero points that are not packed, as compressed-tensors wrote them "
                            "before 0.9, are not supported", source.path,
                            "Take the unquantised model, or a symmetric one.")
        if info.shape != wanted[suffix]:
            raise UserError(f"{info.name} has shape {list(info.shape)}; {settings.bits} bits, groups of {group_size}, "
                            f"as {settings.where} says, make it {list(wanted[suffix])}", source.path, _FIX)
        kinds = FLOATS if suffix == SCALES[layout] else ("I64", "I32") if suffix == "weight_shape" else ("I32",)
        if info.dtype not in kinds:
            raise UserError(f"{info.name} is {info.dtype}, not {' or '.join(kinds)}", source.path, _FIX)
    _check_declared_shape(source, linear, parts)
    order = None
    if GROUP_INDEX[layout] in parts:
        name = f"{linear.base}.{GROUP_INDEX[layout]}"
        try:
            order = order_of(source.read(name), group_size, groups)
        except ValueError as error:
            raise UserError(f"{name} {error}", source.path, _FIX) from None
    scale_dtype = source.infos[f"{linear.base}.{SCALES[layout]}"].dtype
    return Scheme(settings.bits, groups, group_size, scale_dtype, has_order=order is not None), order


def _check_declared_shape(source: Checkpoint, linear: Linear, parts: list[str]) -> None:
    if "weight_shape" in parts:
        declared = source.read(f"{linear.base}.weight_shape").tolist()
        if declared != [linear.outputs, linear.inputs]:
            raise UserError(f"{linear.base}.weight_shape says {declared}, the model makes it "
                            f"{[linear.outputs, linear.inputs]}", source.path, _FIX)


def _all_middle(reader: LayoutReader) -> bool:
    """Whether every zero point of a linear is the middle one and need not be stored."""
    middle = MIDDLE[reader.settings.bits]
    return all((reader.zero(first, min(first + _LOOKED_AT_ROWS, reader.linear.outputs)) == middle).all()
               for first in range(0, reader.linear.outputs, _LOOKED_AT_ROWS))


def _refuse_bias(source: Checkpoint, name: str) -> None:
    info: TensorInfo = source.infos[name]
    values = source.read(name)
    if info.dtype not in FLOATS or to_float32(values, info.dtype).any():
        raise UserError(f"{name} is not zero, and this layer of Qwen1.5 and Qwen2 has no bias", source.path,
                        "Only dense Qwen1.5 and Qwen2 models are converted.")
