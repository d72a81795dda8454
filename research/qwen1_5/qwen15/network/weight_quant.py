"""Quantised matrices on Ascend: cells around the operator WeightQuantBatchMatmul in place of MindFormers' Linears.

The operator computes y = x ((W + offset) scale) with x, scale and offset in float16 or bfloat16 and W in one of three
forms:

    A16W8  W int8 [O, I], transpose_weight True; scale and offset [O]; where rows have one scale each
    A16W8  W int8 [I, O], transpose_weight False; scale and offset [I / group, O], group 64 or 128
    A16W4  W qint4x2 [I, O/2], byte c holding column 2 c in its low nibble and 2 c + 1 in the high one, numbers -8..7,
           transpose_weight False; scale and offset [I / group, O], group 64 or 128

(aclnnWeightQuantBatchMatmulV2, its documentation for Atlas A2: `pergroup` takes INT8 and INT4, W not transposed.)

The offset is the negated zero point. Nobody checks how nibbles are packed: the tests unpack them by the layout above.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Mapping, Optional

import numpy as np

from .. import naming
from ..checkpoint import casting
from ..checkpoint.quantised import MIDDLE, Scheme, dequantise, unpack
from ..errors import UserError
from ..naming import Weight

GROUPS = (128, 64)
"""Inputs that share a scale; the operator takes these."""
_STRIP_ROWS = 4096
"""Rows that are dequantised at once."""


@dataclass(frozen=True)
class Form:
    """How the operator wants one matrix.

    Attributes:
        outputs, inputs: O and I of the whole matrix.
        bits: 4 or 8.
        group: inputs that share a scale; 0 where rows have one each, in 8 bits only.
        has_offset: there are zero points other than the middle.
        cut: naming.COLUMN or naming.ROW, what is cut over several cards.
    """

    outputs: int
    inputs: int
    bits: int
    group: int
    has_offset: bool
    cut: str

    @property
    def transposed(self) -> bool:
        """W lies as [O, I]."""
        return self.group == 0

    def strategies(self, parts: int) -> tuple[tuple[int, ...], ...]:
        """In how many parts each axis of x, W, scale and offset is cut, as MindSpore's `shard` takes it."""
        outputs, inputs = (parts, 1) if self.cut == naming.COLUMN else (1, parts)
        weight: tuple[int, ...]
        scale: tuple[int, ...]
        if self.transposed:
            weight, scale = (outputs, inputs), (outputs,)
        else:
            weight, scale = (inputs, outputs), (inputs, outputs)
        return ((1, inputs), weight, scale, scale)[:4 if self.has_offset else 3]

    def shapes(self, parts: int = 1) -> dict[str, tuple[int, ...]]:
        """'weight', 'weight_scale' and, where there is one, 'weight_offset' -> shape on each of `parts` cards."""
        weight: tuple[int, ...]
        scale: tuple[int, ...]
        if self.transposed:
            weight, scale = (self.outputs, self.inputs), (self.outputs,)
        else:
            columns = self.outputs * self.bits // 8
            weight, scale = (self.inputs, columns), (self.inputs // self.group, self.outputs)
        named = {"weight": weight, "weight_scale": scale, "weight_offset": scale}
        return {name: tuple(size // count for size, count in zip(shape, strategy))
                for (name, shape), strategy in zip(named.items(), self.strategies(parts)[1:])}


def forms(schemes: Mapping[str, Scheme], weights: Mapping[str, Weight], parts: int, where: str) -> dict[str, Form]:
    """The form of every quantised matrix but embedding and head, which are dequantised (`dequantised`).

    Args:
        schemes: MindSpore name -> how a card's slice of it is quantised.
        weights: MindSpore name -> the weight.
        parts: cards.
        where: the checkpoint, for messages.

    Raises:
        UserError: the operator cannot do one of them; says which, why and what to do.
    """
    return {name: _form(scheme, weights[name], parts, where) for name, scheme in schemes.items()
            if weights[name].cut != naming.VOCAB}


def _form(scheme: Scheme, weight: Weight, parts: int, where: str) -> Form:
    outputs, inputs = weight.shape
    own = inputs // parts if weight.cut == naming.ROW else inputs
    if scheme.has_order:
        raise UserError(f"{weight.ms} is quantised with its columns in another order (desc_act), which the operator on "
                        "Ascend does not know", where, "Quantise it with desc_act off, or run it "
                        "with --device_target CPU.")
    if scheme.bits == 8 and scheme.groups == 1:
        return Form(outputs, inputs, 8, 0, scheme.has_zero, weight.cut)
    group = next((size for size in GROUPS if scheme.group_size % size == 0 and own % size == 0), None)
    if group is None:
        cards = f", {own} inputs on each of {parts} cards" if own != inputs else ""
        raise UserError(f"{weight.ms} is {scheme}{cards}; the operator on Ascend takes groups of 64 or 128", where,
                        "Use fewer cards." if own % GROUPS[-1] and parts > 1 else
                        "Quantise it in groups of 64 or 128, or run it with --device_target CPU.")
    if scheme.bits == 4 and outputs // (parts if weight.cut == naming.COLUMN else 1) % 2:
        raise UserError(f"{weight.ms} has an odd number of outputs on each of {parts} cards; two make a byte", where,
                        "Use fewer cards.")
    return Form(outputs, inputs, scheme.bits, group, scheme.has_zero, weight.cut)


def place(cell: Any, wanted: Mapping[str, Form], parts: int) -> None:
    """Put a cell around the operator in place of the Linear of each matrix named in `wanted` ('...wq.weight')."""
    cells = {name: part for name, part in cell.cells_and_names()}
    for name, form in wanted.items():
        path, _, _ = name.rpartition(".")
        parent, _, attribute = path.rpartition(".")
        linear = cells[path]
        replacement = _linear_class()(linear, form, parts)
        setattr(cells[parent], attribute, replacement)
        for part in ("weight", "weight_scale", "weight_offset", "bias"):
            parameter = getattr(replacement, part, None)
            if parameter is not None:
                parameter.name = f"{path}.{part}"


def _linear_class() -> Any:
    """The cell's class; made on use, so that importing this file does not import MindSpore."""
    import mindspore as ms
    from mindspore import Parameter, nn, ops
    from mindspore.common.initializer import initializer
    from mindspore.ops.auto_generate import WeightQuantBatchMatmul

    class WeightQuantLinear(nn.Cell):
        """y = activation(x W + bias) with W quantised; takes bias, activation and dtypes from MindFormers' Linear.

        Args:
            linear: what it stands for.
            form: of its weight.
            parts: cards that the weight is cut over.
        """

        def __init__(self, linear, form: Form, parts: int):
            super().__init__()
            self.in_channels, self.out_channels, self.dtype = form.inputs, form.outputs, linear.dtype
            shapes = form.shapes()
            integers = ms.int8 if form.bits == 8 else ms.qint4x2
            self.weight = Parameter(initializer("zeros", shapes["weight"], integers), requires_grad=False)
            self.weight_scale = Parameter(initializer("zeros", shapes["weight_scale"], linear.dtype),
                                          requires_grad=False)
            self.weight_offset = None
            if form.has_offset:
                self.weight_offset = Parameter(initializer("zeros", shapes["weight_offset"], linear.dtype),
                                               requires_grad=False)
            self.matmul = WeightQuantBatchMatmul(False, form.transposed, form.group)
            if parts > 1:
                self.matmul.shard(form.strategies(parts))
            self.has_bias = linear.has_bias
            if self.has_bias:
                self.bias, self.bias_add = linear.bias, linear.bias_add
            self.activation_flag = linear.activation_flag
            if self.activation_flag:
                self.activation = linear.activation  # w1's Linear applies the gate's SiLU
            self.cast, self.reshape, self.shape = ops.Cast(), ops.Reshape(), ops.Shape()

        def construct(self, x):
            """x (..., I) in any floating dtype -> (..., O) in the same."""
            shape = self.shape(x)[:-1] + (self.out_channels,)
            dtype = x.dtype
            x = self.cast(self.reshape(x, (-1, self.in_channels)), self.dtype)
            x = self.matmul(x, self.weight, self.weight_scale, self.weight_offset, None, None, None)
            if self.has_bias:
                x = self.bias_add(x, self.cast(self.bias, self.dtype))
            if self.activation_flag:
                x = self.activation(x)
            return self.reshape(self.cast(x, dtype), shape)

    return WeightQuantLinear


@dataclass(frozen=True)
class QuantisedMatrix:
    """A quantised matrix, or a rank's slice of one, as a checkpoint stores it; see checkpoint/quantised.py.

    Attributes:
        weight: int8 [O, I], or uint8 [O, I/2] packed.
        scale: [O, G], of `scale_dtype` (BF16 as uint16 bits).
        scale_dtype: 'F16', 'BF16' or 'F32'.
        zero: [O, G] of the integers' dtype, None where it is the middle.
        order: int32 [I], None where columns are in their own order.
    """

    weight: np.ndarray
    scale: np.ndarray
    scale_dtype: str
    zero: Optional[np.ndarray] = None
    order: Optional[np.ndarray] = None

    @property
    def bits(self) -> int:
        """4 or 8."""
        return 8 if self.weight.dtype == np.int8 else 4

    @property
    def inputs(self) -> int:
        """I."""
        return self.weight.shape[1] * (8 // self.bits)


def operator_arrays(stored: QuantisedMatrix, form: Form) -> dict[str, tuple[np.ndarray, str]]:
    """What the operator's parameters hold, in the shapes of `form`: part -> (array, its dtype).

    Args:
        stored: a rank's slice, or the whole matrix.
        form: of the matrix.

    Returns:
        weight: integers ('I8'), packed in 4 bits.
        weight_scale: as stored.
        weight_offset: float32, whole numbers up to 255, which every dtype of the network holds; only with zero points.
    """
    middle = np.float32(MIDDLE[stored.bits])
    floats = {"weight_scale": (stored.scale, stored.scale_dtype)}
    if stored.zero is not None:
        floats["weight_offset"] = (middle - stored.zero.astype(np.float32), "F32")
    if form.transposed:
        return {"weight": (stored.weight, "I8"),
                **{part: (array[:, 0], dtype) for part, (array, dtype) in floats.items()}}
    repeat = stored.inputs // stored.scale.shape[1] // form.group
    if stored.bits == 8:
        weight = np.ascontiguousarray(stored.weight.T)
    else:
        values = unpack(stored.weight).astype(np.int8) - np.int8(middle)
        weight = pack_int4(np.ascontiguousarray(values.T))
    return {"weight": (weight, "I8"),
            **{part: (np.repeat(array, repeat, axis=1).T, dtype) for part, (array, dtype) in floats.items()}}


def pack_int4(values: np.ndarray) -> np.ndarray:
    """(I, O) integers -8..7 to (I, O / 2) int8: column 2 c in the low nibble of byte c, column 2 c + 1 in the high."""
    nibbles = values.astype(np.int8) & np.int8(15)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4).astype(np.int8)


def dequantised(stored: QuantisedMatrix, dtype: str) -> tuple[np.ndarray, casting.Count]:
    """The matrix in 'F32', 'F16' or 'BF16', and what that rounds; strip by strip, for the float32 of a table is large.

    Embedding and head are looked up or multiplied as floats on Ascend: no operator of the network takes them quantised.
    """
    parts, counts = [], casting.Count()
    for start in range(0, len(stored.weight), _STRIP_ROWS):
        rows = slice(start, start + _STRIP_ROWS)
        matrix = dequantise(stored.weight[rows], stored.scale[rows], stored.scale_dtype,
                            None if stored.zero is None else stored.zero[rows], stored.order)
        array, count = casting.cast(matrix, "F32", dtype)
        parts.append(array)
        counts = counts + count
    return np.concatenate(parts), replace(counts, tensors=1)
