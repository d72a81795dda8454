"""The layouts of GPTQ, AWQ GEMM and compressed-tensors: a linear's tensors to the stored form, and back.

    GPTQ                int32 qweight [I b/32, O] along inputs, qzeros [G, O b/32] along outputs, scales [G, O],
                        g_idx [I]; w = s (q - z); version 1 stores z - 1: AutoGPTQ integer by integer, GPTQModel
                        by one subtraction a word, in which a z of 0 borrows from the next column's
    AWQ GEMM            int32 qweight [I, O/8], qzeros [G, O/8], scales [G, O]; a word's columns in an order of its own
    compressed-tensors  int32 weight_packed [O, I b/32] along inputs, weight_zero_point [O b/32, G] along outputs,
                        weight_scale [O, G], weight_shape [2], weight_g_idx [I]

(b bits, O outputs, I inputs, G groups). Integers are carried over as they are; only their places change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import numpy as np

from .quantised import ORDER, SCALE, ZERO, Scheme, checked_order, pack, unpack
from .quantised_settings import QuantizationConfig
from .quantised_words import (
    minus_ones,
    pack_awq,
    pack_columns,
    pack_rows,
    plus_ones,
    unpack_awq,
    unpack_columns,
    unpack_rows,
)
from .reader import Checkpoint
from .view import block_of

INTEGERS = {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_packed"}
"""The tensor that tells a linear of a layout."""
SCALES = {"gptq": "scales", "awq": "scales", "compressed-tensors": "weight_scale"}
ZEROS = {"gptq": "qzeros", "awq": "qzeros", "compressed-tensors": "weight_zero_point"}
GROUP_INDEX = {"gptq": "g_idx", "awq": "", "compressed-tensors": "weight_g_idx"}
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_zero_point",
            "weight_shape", "weight_g_idx")
"""Everything that a quantised linear can consist of, after its name and a dot."""


@dataclass(frozen=True)
class Linear:
    """One linear layer.

    Attributes:
        base: its name without `.weight`, as Hugging Face has it.
        outputs, inputs: O, I.
    """

    base: str
    outputs: int
    inputs: int

    @property
    def weight(self) -> str:
        """The name that it has unquantised."""
        return f"{self.base}.weight"


def shapes(settings: QuantizationConfig, linear: Linear, groups: int) -> dict[str, tuple[int, ...]]:
    """Suffix -> shape of everything that a linear can consist of in a layout."""
    per_word = 32 // settings.bits
    outputs, inputs = linear.outputs, linear.inputs
    if settings.layout == "gptq":
        return {"qweight": (inputs // per_word, outputs), "qzeros": (groups, -(-outputs // per_word)),
                "scales": (groups, outputs), "g_idx": (inputs,)}
    if settings.layout == "awq":
        return {"qweight": (inputs, outputs // per_word), "qzeros": (groups, outputs // per_word),
                "scales": (groups, outputs)}
    return {"weight_packed": (outputs, inputs // per_word), "weight_scale": (outputs, groups), "weight_shape": (2,),
            "weight_zero_point": (-(-outputs // per_word), groups), "weight_g_idx": (inputs,)}


# ---- to the stored form ----

@dataclass(frozen=True)
class LayoutReader:
    """Rows of one linear in the stored form, from a foreign checkpoint whose tensors have been checked.

    Attributes:
        checkpoint: the foreign one.
        settings: of it.
        linear: which.
        scheme: how it is stored here.
        order: stored column j belongs to input order[j]; None where they are the same.
    """

    checkpoint: Checkpoint
    settings: QuantizationConfig
    linear: Linear
    scheme: Scheme
    order: Optional[np.ndarray] = None

    def _block(self, suffix: str, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        return block_of(self.checkpoint, f"{self.linear.base}.{suffix}", rows, columns)

    def integers(self, first: int, last: int) -> np.ndarray:
        """`P`: int8 [n, I], or uint8 [n, I/2] packed."""
        bits, inputs = self.settings.bits, self.linear.inputs
        if self.settings.layout == "gptq":
            values = unpack_rows(self._block("qweight", (0, inputs * bits // 32), (first, last)), bits)
        elif self.settings.layout == "awq":
            values = unpack_awq(self._block("qweight", (0, inputs), (first // 8, -(-last // 8))))[:, :last - first]
        else:
            words = self._block("weight_packed", (first, last), (0, inputs * bits // 32))
            values = unpack_columns(words, bits).T
        if self.order is not None:
            values = values[self.order]
        values = np.ascontiguousarray(values.T)
        return pack(values) if bits == 4 else (values ^ np.uint8(128)).view(np.int8)

    def scale(self, first: int, last: int) -> np.ndarray:
        """`P_scale` [n, G] of the rows first:last, in the checkpoint's dtype."""
        groups = self.scheme.groups
        if self.settings.layout == "compressed-tensors":
            return self._block("weight_scale", (first, last), (0, groups))
        return np.ascontiguousarray(self._block("scales", (0, groups), (first, last)).T)

    def zero(self, first: int, last: int) -> np.ndarray:
        """`P_zero` [n, G]; `first` is a multiple of 32."""
        bits, groups = self.settings.bits, self.scheme.groups
        words = (first * bits // 32, -(-last * bits // 32))
        if self.settings.layout == "compressed-tensors":
            values = unpack_rows(self._block("weight_zero_point", words, (0, groups)), bits)[:last - first]
        else:
            block = self._block(ZEROS[self.settings.layout], (0, groups), words)
            block = plus_ones(block, bits) if self.settings.borrows else block
            values = unpack_awq(block) if self.settings.layout == "awq" else unpack_columns(block, bits)
            values = values.T[:last - first]
        if self.settings.version == 1 and not self.settings.borrows:
            values = (values + np.uint8(1)) & np.uint8(2 ** bits - 1)
        values = np.ascontiguousarray(values)
        return values if bits == 4 else (values ^ np.uint8(128)).view(np.int8)


# ---- and back ----

@dataclass(frozen=True)
class Writer:
    """Rows of one linear's foreign tensors, from the stored form.

    Attributes:
        checkpoint: holds the stored form, whole.
        name: of the matrix in it.
        settings: of the foreign checkpoint.
        linear: which.
        scheme: how it is stored.
    """

    checkpoint: Checkpoint
    name: str
    settings: QuantizationConfig
    linear: Linear
    scheme: Scheme

    def rows(self, suffix: str, first: int, last: int) -> np.ndarray:
        """The rows first:last of the foreign tensor `base.suffix`, seen as a matrix [R, C], in its own dtype."""
        layout = self.settings.layout
        if suffix == INTEGERS[layout]:
            return self._integers(first, last)
        if suffix == SCALES[layout]:
            scale = self.checkpoint.read(self.name + SCALE)
            return (scale if layout == "compressed-tensors" else scale.T)[first:last]
        if suffix == ZEROS[layout]:
            return self._zeros()[first:last]
        if suffix == GROUP_INDEX[layout]:
            return self._group_index()[first:last]
        if suffix == "weight_shape":
            return np.array([self.linear.outputs, self.linear.inputs], np.int64)[first:last]
        raise KeyError(suffix)

    def _order(self) -> Optional[np.ndarray]:
        if not self.scheme.has_order:
            return None
        return checked_order(self.checkpoint.read(self.name + ORDER), self.name, self.checkpoint.path)

    def _values(self, rows: tuple[int, int], inputs: tuple[int, int]) -> np.ndarray:
        """Unsigned integers [n, inputs] in the inputs' own order."""
        order = self._order()
        wanted = inputs
        if order is not None:  # the inputs asked for may be anywhere
            inputs = (0, self.linear.inputs)
        elif self.settings.bits == 4:
            inputs = (inputs[0] // 32 * 32, -(-inputs[1] // 32) * 32)
        columns = inputs if self.settings.bits == 8 else (inputs[0] // 2, inputs[1] // 2)
        stored = block_of(self.checkpoint, self.name, rows, columns)
        values = unpack(stored) if self.settings.bits == 4 else stored.view(np.uint8) ^ np.uint8(128)
        if order is None:
            return values[:, wanted[0] - inputs[0]:wanted[1] - inputs[0]]
        places = np.empty_like(order)
        places[order] = np.arange(len(order), dtype=order.dtype)
        return values[:, places[wanted[0]:wanted[1]]]

    def _integers(self, first: int, last: int) -> np.ndarray:
        bits, outputs, inputs = self.settings.bits, self.linear.outputs, self.linear.inputs
        per_word = 32 // bits
        if self.settings.layout == "gptq":
            values = self._values((0, outputs), (first * per_word, last * per_word))
            return pack_rows(np.ascontiguousarray(values.T), bits)
        if self.settings.layout == "awq":
            return pack_awq(np.ascontiguousarray(self._values((0, outputs), (first, last)).T))
        return pack_columns(np.ascontiguousarray(self._values((first, last), (0, inputs))), bits)

    def _zeros(self) -> np.ndarray:
        bits, outputs, groups = self.settings.bits, self.linear.outputs, self.scheme.groups
        if self.scheme.has_zero:
            stored = self.checkpoint.read(self.name + ZERO)
            values = stored if bits == 4 else stored.view(np.uint8) ^ np.uint8(128)
        else:
            values = np.full((outputs, groups), 2 ** (bits - 1), np.uint8)
        if self.settings.version == 1 and not self.settings.borrows:
            values = (values - np.uint8(1)) & np.uint8(2 ** bits - 1)
        if self.settings.layout == "awq":
            return pack_awq(np.ascontiguousarray(values.T))
        spare = -outputs % (32 // bits)
        values = np.concatenate([values, np.zeros((spare, groups), np.uint8)]) if spare else values
        if self.settings.layout == "gptq":
            stored_words = pack_columns(np.ascontiguousarray(values.T), bits)
            return minus_ones(stored_words, bits) if self.settings.borrows else stored_words
        return pack_rows(np.ascontiguousarray(values), bits)

    def _group_index(self) -> np.ndarray:
        groups = np.arange(self.linear.inputs, dtype=np.int32) // np.int32(self.scheme.group_size)
        order = self._order()
        if order is None:
            return groups
        index = np.empty_like(groups)
        index[order] = groups
        return index


def order_of(index: np.ndarray, group_size: int, groups: int) -> Optional[np.ndarray]:
    """The order that sorts columns by their groups, int32 [I], None where they are sorted.

    Raises:
        ValueError: a group that does not exist, or not so many columns in each as a group has.
    """
    if index.size and (index.min() < 0 or index.max() >= groups):
        wrong = int(index.min()) if index.min() < 0 else int(index.max())
        raise ValueError(f"names group {wrong}, there are {groups}")
    counts = np.bincount(index, minlength=groups)
    if (counts != group_size).any():
        group = int(np.flatnonzero(counts != group_size)[0])
        raise ValueError(f"puts {counts[group]} columns into group {group}, a group has {group_size}")
    if (index[1:] >= index[:-1]).all():
        return None
    return np.argsort(index, kind="stable").astype(np.int32)
