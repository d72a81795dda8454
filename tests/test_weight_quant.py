"""What the Ascend operator is given for a quantised matrix means what the checkpoint's tensors mean, bit for bit."""

import numpy as np
import pytest
from quantised_fixtures import unpack_int4
from qwen15 import naming
from qwen15.ascend.operators import weight_quant_matmul
from qwen15.checkpoint.quantised import Scheme, dequantise, pack
from qwen15.errors import UserError
from qwen15.naming import Weight
from qwen15.network import weight_quant
from qwen15.network.weight_quant import QuantisedMatrix

NAME = "model.layers.0.attention.wo.weight"


def form_of(scheme, inputs, outputs=6, cut=naming.COLUMN, parts=1):
    """The form of one matrix, as a network of `parts` cards wants it; `scheme` is that of a card's slice."""
    return weight_quant.forms({NAME: scheme}, {NAME: Weight(NAME, NAME, (outputs, inputs), cut, 0)}, parts, "x")[NAME]


def random_matrix(bits, outputs, inputs, groups, zeros, seed=0):
    """Integers of the whole range, scales of either sign, zero points or none."""
    random = np.random.default_rng(seed)
    low, high, dtype = (0, 16, np.uint8) if bits == 4 else (-128, 128, np.int8)
    integers = random.integers(low, high, (outputs, inputs)).astype(dtype)
    zero = random.integers(low, high, (outputs, groups)).astype(dtype) if zeros else None
    scale = random.normal(0, 0.02, (outputs, groups)).astype(np.float16)
    return QuantisedMatrix(pack(integers) if bits == 4 else integers, scale, "F16", zero)


@pytest.mark.parametrize("zeros", (False, True), ids=("middle", "zero points"))
@pytest.mark.parametrize("bits, inputs, group", (
    (8, 96, 96), (8, 256, 64), (8, 512, 256), (8, 384, 192), (4, 128, 64), (4, 384, 128), (4, 512, 256), (4, 384, 192),
    (4, 192, 192)))
def test_the_operator_is_given_what_the_checkpoint_means(bits, inputs, group, zeros):
    """Groups larger than the operator's are given as several that have one scale; 192 is none of its sizes."""
    outputs, groups = 6, inputs // group
    stored = random_matrix(bits, outputs, inputs, groups, zeros)
    form = form_of(Scheme(bits, groups, group, "F16", zeros), inputs, outputs)
    given = {part: array for part, (array, _) in weight_quant.operator_arrays(stored, form).items()}
    assert {part: array.shape for part, array in given.items()} == form.shapes()
    assert form.group in ((0, 64, 128) if bits == 8 else (64, 128))
    weight = unpack_int4(given["weight"]) if bits == 4 else given["weight"]
    meant = weight_quant_matmul(np.eye(inputs, dtype=np.float32), weight, given["weight_scale"].astype(np.float32),
                                given.get("weight_offset"), form.transposed).T
    assert np.array_equal(meant, dequantise(stored.weight, stored.scale, "F16", stored.zero))


def test_the_even_column_lies_in_the_low_nibble():
    packed = weight_quant.pack_int4(np.asarray([[1, -2, 7, -8]], np.int8))
    assert packed.view(np.uint8).tolist() == [[0xE1, 0x87]]
    assert unpack_int4(packed).tolist() == [[1, -2, 7, -8]]


@pytest.mark.parametrize("cut, form, strategies", (
    (naming.COLUMN, (8, 0), ((1, 1), (2, 1), (2,), (2,))), (naming.ROW, (8, 0), ((1, 2), (1, 2), (1,), (1,))),
    (naming.COLUMN, (4, 64), ((1, 1), (1, 2), (1, 2), (1, 2))),
    (naming.ROW, (4, 64), ((1, 2), (2, 1), (2, 1), (2, 1)))))
def test_integers_and_scales_are_cut_alike(cut, form, strategies):
    """x, weight, scale, offset. A row-parallel A16W8 keeps the whole scale: it belongs to rows."""
    assert weight_quant.Form(8, 256, *form, True, cut).strategies(2) == strategies
    assert weight_quant.Form(8, 256, *form, False, cut).strategies(2) == strategies[:3]


@pytest.mark.parametrize("scheme, inputs, outputs, cut, parts, words, fix", (
    (Scheme(4, 2, 128, "F16", True, True), 256, 6, naming.COLUMN, 1, "another order (desc_act)", "desc_act off"),
    (Scheme(4, 8, 32, "F16"), 256, 6, naming.COLUMN, 1, "int4, groups of 32; the operator on Ascend takes groups of 64 "
     "or 128", "Quantise it in groups of 64 or 128"),
    (Scheme(8, 3, 32, "F16"), 96, 6, naming.COLUMN, 1, "groups of 32", "Quantise it in groups of 64 or 128"),
    (Scheme(4, 3, 32, "F16"), 192, 6, naming.ROW, 2, "96 inputs on each of 2 cards", "Use fewer cards."),
    (Scheme(4, 2, 64, "F16"), 128, 6, naming.COLUMN, 2, "an odd number of outputs on each of 2 cards",
     "Use fewer cards.")))
def test_what_the_operator_cannot_do_is_refused_with_what_to_do(scheme, inputs, outputs, cut, parts, words, fix):
    with pytest.raises(UserError) as caught:
        form_of(scheme, inputs, outputs, cut, parts)
    assert words in caught.value.what and NAME in caught.value.what and fix in caught.value.fix
