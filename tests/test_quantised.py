"""The stored form of quantised matrices: bits in their places, values as defined, and damage told by name."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qwen15.checkpoint.quantised import Scheme, companion_of, dequantise, pack, scheme_of, unpack
from qwen15.checkpoint.tensors import TensorInfo
from qwen15.errors import UserError

NAME = "model.layers.0.attention.wq.weight"


def test_a_nibble_lies_where_the_layout_says():
    values = np.zeros((1, 64), np.uint8)
    for block in range(2):
        for nibble in range(4):
            for word in range(8):
                values[:] = 0
                values[0, 32 * block + 8 * nibble + word] = 13
                words = pack(values).view("<u2").reshape(2, 8)
                assert words[block, word] == 13 << 4 * nibble and np.count_nonzero(words) == 1


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2 ** 32 - 1))
def test_what_is_packed_unpacks_to_itself(outputs, blocks, seed):
    values = np.random.default_rng(seed).integers(0, 16, (outputs, 32 * blocks), dtype=np.uint8)
    assert pack(values).shape == (outputs, 16 * blocks)
    assert np.array_equal(unpack(pack(values)), values)


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantised_values_are_scale_times_distance_from_zero_one_by_one(bits):
    rng = np.random.default_rng(bits)
    low, high = (0, 16) if bits == 4 else (-128, 128)
    integers = rng.integers(low, high, (3, 64)).astype(np.uint8 if bits == 4 else np.int8)
    scale = rng.standard_normal((3, 2)).astype(np.float16)  # negative ones among them
    zero = rng.integers(low, high, (3, 2)).astype(integers.dtype)
    order = rng.permutation(64).astype(np.int32)
    made = dequantise(pack(integers) if bits == 4 else integers, scale, "F16", zero, order)
    for row in range(3):
        for j in range(64):
            group = j // 32
            wanted = np.float32(scale[row, group]) * np.float32(int(integers[row, j]) - int(zero[row, group]))
            assert made[row, order[j]] == wanted


def test_without_zero_points_the_middle_is_zero():
    half = np.full((1, 1), 0.5, np.float32)
    assert dequantise(pack(np.full((1, 32), 9, np.uint8)), half, "F32").tolist() == [[0.5] * 32]
    assert dequantise(np.full((1, 32), 9, np.int8), half, "F32").tolist() == [[4.5] * 32]


def test_a_matrix_describes_itself():
    for scheme in (Scheme(4, 2, 64, "F16"), Scheme(4, 1, 128, "BF16", True), Scheme(8, 4, 32, "F32", True, True)):
        infos = {info.name: info for info in scheme.infos(NAME, (5, 128))}
        assert scheme_of(infos, NAME, (5, 128), "x") == scheme
        assert all(companion_of(name) == NAME for name in infos if name != NAME)
    assert scheme_of({NAME: TensorInfo.of(NAME, "BF16", (5, 128))}, NAME, (5, 128), "x") is None
    assert companion_of(NAME) is None


@pytest.mark.parametrize("change, words", [
    ({NAME + "_scale": None}, "_scale is missing"),
    ({NAME: ("U8", (5, 128))}, "4 bits for [5, 128] make it [5, 64]"),
    ({NAME: ("BF16", (5, 128))}, "not quantised, yet"),
    ({NAME + "_scale": ("F16", (4, 2))}, "no scale of"),
    ({NAME + "_scale": ("I32", (5, 2))}, "no scale of"),
    ({NAME + "_scale": ("F16", (5, 3))}, "3 groups"),
    ({NAME + "_scale": ("F16", (5, 8))}, "8 groups"),
    ({NAME + "_zero": ("U8", (5, 2))}, "should be I8"),
    ({NAME + "_order": ("I32", (5,))}, "should be I32 [128]"),
])
def test_contradictions_are_told(change, words):
    infos = {info.name: info for info in Scheme(8, 2, 64, "F16", True).infos(NAME, (5, 128))}
    for name, entry in change.items():
        infos.pop(name, None)
        if entry is not None:
            infos[name] = TensorInfo.of(name, *entry)
    with pytest.raises(UserError, match="") as caught:
        scheme_of(infos, NAME, (5, 128), "x.safetensors")
    assert words in str(caught.value) and "x.safetensors" in str(caught.value)
