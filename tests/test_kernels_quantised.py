"""The kernels on quantised weights equal their twins in NumPy float64, on every instruction set this machine runs."""

from __future__ import annotations

import os

import numpy as np
import pytest
from kernels_cases import (
    BF16,
    F16,
    F32,
    Quantised,
    Stored,
    call,
    decode_kept,
    flat,
    linear,
    relative_error,
    rmsnorm,
    silu,
    tolerance,
)
from kernels_remote import COMMAND
from test_kernels import (  # noqa: F401  (fixtures)
    EPS,
    StackCase,
    binding,
    decode_rows,
    driver,
    first_of_the_largest,
    kernels,
    qkv,
    qkv_weights,
    rope,
    threads,
    weight,
)

SCHEMES = ({"bits": 8, "group": 32}, {"bits": 8, "group": 128, "zero": True}, {"bits": 8, "scale_dtype": F32},
           {"bits": 4, "group": 32, "zero": True}, {"bits": 4, "group": 64, "scale_dtype": BF16},
           {"bits": 4, "group": 128, "zero": True, "order": True}, {"bits": 4, "zero": True})


def scheme_name(scheme):
    return " ".join(f"{key}={value}" for key, value in scheme.items())


@pytest.fixture(params=(True, False), ids=("31 bits", "16 bits"))
def accuracy(request, kernels):  # noqa: F811
    """Largest relative error of a product, with activations of 31 and of 16 bits."""
    kernels.exact_activations = request.param
    yield 2e-5 if request.param else 2e-4
    kernels.exact_activations = True


def columns_for(scheme):
    """Sizes around a vector's, of whole groups."""
    group = scheme.get("group", 32)
    return (group, 3 * group, 1152) if group < 128 else (128, 384, 1152)


@pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_name)
@pytest.mark.parametrize("tokens", (1, 2, 3, 4, 7, 8, 13, 31, 32, 63, 64, 70))
def test_project_with_and_without_residual(kernels, accuracy, scheme, tokens):  # noqa: F811
    rng = np.random.default_rng(tokens)
    for cols, rows in zip(columns_for(scheme), (48, 130, 70)):
        x, w = rng.standard_normal((tokens, cols)).astype(np.float32), Quantised(rng, (rows, cols), **scheme)
        residual = rng.standard_normal((tokens, rows)).astype(np.float32)
        wanted = linear(x.astype(np.float64), w)
        assert relative_error(call("project", (x, w), (tokens, rows)), wanted) < accuracy
        assert relative_error(call("project_add", (x, w, residual), (tokens, rows)), wanted + residual) < accuracy


@pytest.mark.parametrize("scheme", SCHEMES[:5], ids=scheme_name)
@pytest.mark.parametrize("tokens", (5, 8, 19))
def test_rows_that_meet_activations_piece_by_piece(kernels, accuracy, scheme, tokens):  # noqa: F811
    rng = np.random.default_rng(tokens)
    cols = 2816 + scheme.get("group", 32)
    x, w = rng.standard_normal((tokens, cols)).astype(np.float32), Quantised(rng, (75, cols), **scheme)
    assert relative_error(call("project", (x, w), (tokens, 75)), linear(x.astype(np.float64), w)) < accuracy


@pytest.mark.parametrize("tokens", (1, 4, 40))
def test_an_outlier_among_activations_leaves_the_others_whole(kernels, tokens):  # noqa: F811
    rng = np.random.default_rng(tokens)
    x, w = rng.standard_normal((tokens, 1536)).astype(np.float32), Quantised(rng, (96, 1536), 4, 128)
    x[:, 5] = 1000
    error = call("project", (x, w), (tokens, 96)) - linear(x.astype(np.float64), w)
    assert np.sqrt((error * error).mean()) < 5e-5


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("tokens", (1, 3, 40))
def test_what_is_not_finite_stays_so_and_with_its_token(kernels, tokens, bits, bad):  # noqa: F811
    rng = np.random.default_rng(6)
    x, w = rng.standard_normal((tokens, 256)).astype(np.float32), Quantised(rng, (48, 256), bits, 128, zero=True)
    x[0, 77] = bad
    got = call("project", (x, w), (tokens, 48))
    assert not np.isfinite(got[0]).any() and np.isfinite(got[1:]).all()


def test_activations_of_zero_give_zero(kernels):  # noqa: F811
    w = Quantised(np.random.default_rng(7), (48, 256), 4, 64, zero=True)
    np.testing.assert_array_equal(call("project", (np.zeros((2, 256), np.float32), w), (2, 48)), np.zeros((2, 48)))


BY_32, BY_64, ORDERED = {"bits": 4, "group": 32}, {"bits": 4, "group": 64}, {"bits": 4, "group": 64, "order": True}
GATED = ((BY_32, {**BY_32, "zero": True}), (BY_32, BY_64), ({"bits": 8, "group": 64}, BY_32), ({"bits": 8}, None),
         (None, {"bits": 4}), (ORDERED, ORDERED))


@pytest.mark.parametrize("plain", (F32, BF16))
@pytest.mark.parametrize("gate, up", GATED)
@pytest.mark.parametrize("tokens", (1, 5, 40))
def test_gate_and_up_may_be_quantised_each_in_its_own_way(kernels, threads, gate, up, plain, tokens):  # noqa: F811
    rng = np.random.default_rng(tokens)
    shape = (150, 192)
    w1, w3 = (weight(rng, shape, plain) if scheme is None else Quantised(rng, shape, **scheme) for scheme in (gate, up))
    x, norm = rng.standard_normal((tokens, 192)).astype(np.float32), weight(rng, 192, F32, 1.0)
    normed = rmsnorm(x.astype(np.float64), norm, EPS)
    got = call("gate_up", (x, norm, w1, w3, np.array([EPS], np.float32)), (tokens, 150))
    wanted = silu(linear(normed, w1)) * linear(normed, w3)
    assert relative_error(got, wanted) < tolerance(BF16 if BF16 in (w1.dtype, w3.dtype) else F32)


@pytest.mark.parametrize("order", (False, True))
@pytest.mark.parametrize("mixture", ((4, 4, 4), (4, 8, 4), (4, BF16, F32), (F16, 8, BF16)))
def test_query_key_and_value_may_be_quantised_each_in_its_own_way(kernels, threads, mixture, order):  # noqa: F811
    rng = np.random.default_rng(8)
    heads, kv_heads, dim, hidden, tokens = 4, 2, 16, 96, 5
    weights, (cos, sin) = qkv_weights(rng, hidden, heads, kv_heads, dim, F32), rope(64, dim)
    for place, kind in zip((1, 3, 5), mixture):
        shape = weights[place].shape
        plain = isinstance(kind, str)
        weights[place] = weight(rng, shape, kind) if plain else Quantised(rng, shape, kind, 32, order=order)
    x, positions = rng.standard_normal((tokens, hidden)).astype(np.float32), np.arange(tokens, dtype=np.int32)
    keys, values = weight(rng, (2, 4, kv_heads, dim), F32), weight(rng, (2, 4, kv_heads, dim), F32)
    got = call("qkv", (x, *weights, cos, sin, positions, positions, keys, values, np.array([EPS], np.float32)),
               (tokens, heads * dim))
    q, k, v = qkv(x.astype(np.float64), weights, cos, sin, positions, heads, kv_heads, dim)
    for result, wanted in ((got, q), (keys.values.reshape(8, kv_heads, dim)[:tokens], k),
                           (values.values.reshape(8, kv_heads, dim)[:tokens], v)):
        assert relative_error(result, wanted) < tolerance(BF16 if BF16 in mixture else F32)


@pytest.mark.parametrize("zero", (False, True))
@pytest.mark.parametrize("group", (32, 64, 0))
def test_embed_gives_rows_of_8_bits_exactly(kernels, group, zero):  # noqa: F811
    rng = np.random.default_rng(2)
    table, ids = Quantised(rng, (31, 192), 8, group, zero=zero), rng.integers(0, 31, 40).astype(np.int32)
    np.testing.assert_array_equal(call("embed", (ids, table), (40, 192)), table.values[ids].astype(np.float32))


class QuantisedStack(StackCase):
    """A network of two layers, each of whose matrices has a scheme of its own; table and head have 8 bits."""

    hidden, inner, heads, kv_heads, dim = 64, 96, 4, 2, 16

    def __init__(self, cache_dtype, lens, cached, first, second):
        super().__init__(F32, cache_dtype, lens, cached)
        rng = np.random.default_rng(9)
        hidden, inner, width, kv = self.hidden, self.inner, self.heads * self.dim, self.kv_heads * self.dim
        shapes = {1: (width, hidden), 3: (kv, hidden), 5: (kv, hidden), 7: (hidden, width), 9: (inner, hidden),
                  10: (inner, hidden), 11: (hidden, inner)}
        for layer, schemes in zip(self.layers, (first, second)):
            layer[0], layer[8] = weight(rng, hidden, F32, 1.0), weight(rng, hidden, F32, 1.0)
            for (place, shape), scheme in zip(shapes.items(), schemes):
                plain = isinstance(scheme, str)
                layer[place] = weight(rng, shape, scheme) if plain else Quantised(rng, shape, **scheme)
        self.norm = weight(rng, hidden, F32, 1.0)
        self.table, self.head = (Quantised(rng, (101, hidden), 8, 32, size=size) for size in (1.0, 0.1))


PLAIN4 = [{"bits": 4, "group": 32, "zero": True}] * 7
MIXED = [BY_32, {"bits": 8}, F32, ORDERED, ORDERED, ORDERED, BF16]


@pytest.mark.parametrize("first, second", ((PLAIN4, PLAIN4), (PLAIN4, MIXED), ([F32] * 7, MIXED)),
                         ids=("4 bits", "mixed", "few"))
@pytest.mark.parametrize("lens, cached", (((1,), (9,)), ((1, 1, 1), (0, 20, 33)), ((40, 3, 1), (0, 8, 50)),
                                          ((1100, 30), (0, 5))))
def test_whole_stack_of_any_mixture_equals_its_layers(kernels, first, second, lens, cached):  # noqa: F811
    case = QuantisedStack(F32, lens, cached, first, second)
    got = call("decoder", case.inputs, case.logits_shape)
    assert relative_error(got, case.twin()) < 3 * tolerance(BF16 if BF16 in second else F32)


def test_a_decode_on_kept_quantised_weights_equals_the_whole_stack(kernels, binding):  # noqa: F811
    case = QuantisedStack(F32, (1, 1), (4, 20), PLAIN4, MIXED)
    case.binding = binding
    wanted = call("decoder", case.inputs, case.logits_shape)
    held = [value.memory if isinstance(value, Stored) else value for value in flat(case.inputs[8:])]
    assert kernels.bound_addresses(binding) == [memory.ctypes.data for memory in held]
    got = call("decode", [np.array([binding], np.int32), decode_rows(case), case.head], case.logits_shape)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("scheme", ({"bits": 8, "group": 32}, {"bits": 4, "group": 64, "zero": True}), ids=scheme_name)
@pytest.mark.parametrize("sequences", (1, 6, 40))
def test_a_decode_on_a_quantised_head_says_which_logit_is_largest(kernels, threads, scheme, sequences):  # noqa: F811
    case = QuantisedStack(F32, (1,) * sequences, (5,) * sequences, PLAIN4, PLAIN4)
    case.head = Quantised(np.random.default_rng(4), (517, case.hidden), **scheme)
    integers, scale, *_ = case.head.parts
    for changed in ("nothing", "rows 20 and 500 alike and far ahead", "NaN"):
        if changed == "NaN":
            scale.memory[300] = np.nan
        elif changed != "nothing":
            scale.memory[[20, 500]] = 100 * scale.memory[20]
            for part in case.head.parts:
                if part is not scale:
                    part[500] = part[20]
        logits, largest = decode_kept(case.inputs, decode_rows(case), (sequences, 517))
        np.testing.assert_array_equal(largest, first_of_the_largest(logits))


def test_quantised_weights_that_do_not_fit_are_refused(kernels):  # noqa: F811
    if os.environ.get(COMMAND):
        pytest.skip("the driver's messages are the same")
    rng = np.random.default_rng(3)
    x, w = np.zeros((1, 128), np.float32), Quantised(rng, (48, 128), 4, 32, zero=True, order=True)
    q, scale, zero, order = w.parts

    def refused(why, *parts):
        with pytest.raises(RuntimeError, match=why):
            call("project", (x, *parts), (1, 48))

    refused("its scale .* groups have to be", q)
    refused("groups have to be", q, Stored(scale.values[:, :3], F16))
    refused("groups have to be", q, Stored(scale.values[:40], F16))
    refused("scale .* is int8", q, zero.astype(np.int8), zero)
    refused("wanted", q[:, :32], scale, zero)
    refused(r"order\[3\] is 128", q, scale, zero, np.where(np.arange(128) == 3, 128, order).astype(np.int32))
    refused("order .* has 127", q, scale, zero, order[:127].copy())
    with pytest.raises(RuntimeError, match="table is of 4 bits"):
        call("embed", (np.zeros(1, np.int32), q, scale), (1, 128))
