"""Every kernel equals its twin in NumPy float64, on every instruction set this machine runs."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from kernels_cases import (
    BF16,
    F16,
    F32,
    Batch,
    Stored,
    attention,
    call,
    decode_kept,
    linear,
    relative_error,
    rmsnorm,
    rotate,
    silu,
    tolerance,
)
from kernels_remote import COMMAND, close, load
from qwen15.errors import UserError
from qwen15.kernels import library

try:
    KERNELS = [name for name in library.KERNELS if load().can_run(name)]
except UserError as error:
    pytest.skip(str(error), allow_module_level=True)

EPS = 1e-6
DTYPES = (F32, F16, BF16)


@pytest.fixture(scope="module", autouse=True)
def driver():
    """A driver's end is part of the test: that is when a sanitizer reports leaks."""
    yield
    close()


@pytest.fixture(params=KERNELS)
def kernels(request):
    loaded = load()
    before = loaded.kernels
    loaded.use_kernels(request.param)
    yield loaded
    loaded.use_kernels(before)


@pytest.fixture(params=(1, 2, 3))
def threads(request):
    loaded = load()
    before = loaded.threads
    loaded.threads = request.param
    yield request.param
    loaded.threads = before


def weight(rng, shape, dtype, scale=0.05):
    return Stored(rng.standard_normal(shape) * scale, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", (1, 2, 3, 5, 8, 13, 16, 31, 70))
def test_project_with_and_without_residual(kernels, dtype, tokens):
    rng = np.random.default_rng(tokens)
    for cols, rows in ((64, 48), (88, 100), (1712, 70), (1100, 130)):
        x, w = rng.standard_normal((tokens, cols)).astype(np.float32), weight(rng, (rows, cols), dtype)
        residual = rng.standard_normal((tokens, rows)).astype(np.float32)
        wanted = linear(x.astype(np.float64), w)
        assert relative_error(call("project", (x, w), (tokens, rows)), wanted) < 2e-5
        assert relative_error(call("project_add", (x, w, residual), (tokens, rows)), wanted + residual) < 2e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skipped, more", ((1, 0), (4, 32), (9, 5), (31, 1)))
def test_weights_begin_anywhere_in_a_cache_line_and_nothing_beside_them_counts(kernels, dtype, skipped, more):
    rng = np.random.default_rng(skipped)
    rows, cols = 130, 320
    gate, up = weight(rng, (rows, cols), dtype), weight(rng, (rows, cols), dtype)
    placed = gate.among_nans(skipped), up.among_nans(skipped + more)
    norm, eps = weight(rng, cols, dtype, 1.0), np.array([EPS], np.float32)
    for tokens in (1, 2, 4, 8, 11, 20, 70):
        x = rng.standard_normal((tokens, cols)).astype(np.float32)
        assert relative_error(call("project", (x, placed[0]), (tokens, rows)),
                              linear(x.astype(np.float64), gate)) < 2e-5
        normed = rmsnorm(x.astype(np.float64), norm, EPS)
        got = call("gate_up", (x, norm, *placed, eps), (tokens, rows))
        assert relative_error(got, silu(linear(normed, gate)) * linear(normed, up)) < tolerance(dtype)


@pytest.mark.parametrize("tokens", (1, 4, 8, 16, 20, 32, 48, 64, 80, 512))
def test_float32_sums_stay_accurate_beside_an_outlier(kernels, tokens):
    rng = np.random.default_rng(tokens)
    x, w = rng.standard_normal((tokens, 1536)).astype(np.float32), weight(rng, (96, 1536), F32)
    x[:, 5] = 1000
    error = call("project", (x, w), (tokens, 96)) - linear(x.astype(np.float64), w)
    assert np.sqrt((error * error).mean()) < 2.5e-5  # one chain over all inputs: 4e-5 to 6e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", (1, 3, 8, 20))
def test_gate_up_of_any_width(kernels, dtype, tokens):
    rng = np.random.default_rng(tokens)
    for hidden, inner in ((64, 176), (80, 43), (520, 90)):
        x = rng.standard_normal((tokens, hidden)).astype(np.float32)
        norm, w1, w3 = weight(rng, hidden, dtype, 1.0), weight(rng, (inner, hidden), dtype), weight(rng,
                                                                                                    (inner, hidden),
                                                                                                    dtype)
        normed = rmsnorm(x.astype(np.float64), norm, EPS)
        got = call("gate_up", (x, norm, w1, w3, np.array([EPS], np.float32)), (tokens, inner))
        assert relative_error(got, silu(linear(normed, w1)) * linear(normed, w3)) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_takes_each_sequence_s_last_token(kernels, dtype):
    rng = np.random.default_rng(1)
    hidden, vocab = 96, 517
    for lens in ((1,), (4, 1, 7), (1,) * 19):
        x = rng.standard_normal((sum(lens), hidden)).astype(np.float32)
        norm, w = weight(rng, hidden, dtype, 1.0), weight(rng, (vocab, hidden), dtype)
        last = x[np.cumsum(lens) - 1].astype(np.float64)
        got = call("head", (x, np.array(lens, np.int32), norm, w, np.array([EPS], np.float32)), (len(lens), vocab))
        assert relative_error(got, linear(rmsnorm(last, norm, EPS), w)) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed_copies_rows_exactly(kernels, dtype):
    rng = np.random.default_rng(2)
    for hidden in (8, 64, 100):
        table, ids = weight(rng, (31, hidden), dtype, 1.0), rng.integers(0, 31, 40).astype(np.int32)
        np.testing.assert_array_equal(call("embed", (ids, table), (40, hidden)), table.values[ids].astype(np.float32))


def rope(length, dim):
    angles = np.arange(length)[:, None] / 1e4 ** (np.arange(0, dim, 2) / dim)
    angles = np.concatenate((angles, angles), 1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def qkv_weights(rng, hidden, heads, kv_heads, dim, dtype):
    shapes = ((hidden,), (heads * dim, hidden), (heads * dim,), (kv_heads * dim, hidden), (kv_heads * dim,),
              (kv_heads * dim, hidden), (kv_heads * dim,))
    return [weight(rng, shape, dtype, 0.3 if len(shape) == 1 else 0.1) for shape in shapes]


def qkv(x, weights, cos, sin, positions, heads, kv_heads, dim):
    """Twin: (q (T, H*D), k (T, K, D), v (T, K, D)) before they are rounded to the cache's dtype."""
    norm, wq, bq, wk, bk, wv, bv = weights
    normed = rmsnorm(x, norm, EPS)
    cos, sin = cos[positions].astype(np.float64), sin[positions].astype(np.float64)
    q, k, v = ((linear(normed, w) + b.values).reshape(len(x), -1, dim) for w, b in ((wq, bq), (wk, bk), (wv, bv)))
    return rotate(q, cos, sin).reshape(len(x), -1), rotate(k, cos, sin), v


@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_qkv_rotates_and_writes_only_its_slots(kernels, threads, dtype, cache_dtype):
    rng = np.random.default_rng(3)
    for (heads, kv_heads, dim), lens in (((4, 4, 16), (1,)), ((6, 2, 20), (5, 1, 17)), ((8, 1, 80), (2, 2))):
        batch, hidden = Batch(rng, lens, [3 * i for i in range(len(lens))], block_size=4), 72
        x = rng.standard_normal((batch.tokens, hidden)).astype(np.float32)
        weights, (cos, sin) = qkv_weights(rng, hidden, heads, kv_heads, dim, dtype), rope(64, dim)
        shape = (batch.num_blocks, 4, kv_heads, dim)
        keys, values = weight(rng, shape, cache_dtype, 1.0), weight(rng, shape, cache_dtype, 1.0)
        before = keys.memory.copy(), values.memory.copy()
        slots = batch.slots.copy()
        slots[0] = -1  # writes nothing
        got = call("qkv", (x, *weights, cos, sin, batch.positions, slots, keys, values, np.array([EPS], np.float32)),
                   (batch.tokens, heads * dim))
        q, k, v = qkv(x.astype(np.float64), weights, cos, sin, batch.positions, heads, kv_heads, dim)
        assert relative_error(got, q) < tolerance(dtype)
        for cache, old, wanted in ((keys, before[0], k), (values, before[1], v)):
            flat = cache.values.reshape(-1, kv_heads, dim)
            stored = {F32: 3e-5, F16: 1e-3, BF16: 8e-3}[cache_dtype]
            assert relative_error(flat[slots[1:]], wanted[1:]) < max(stored,
                                                                     tolerance(dtype)) if batch.tokens > 1 else True
            untouched = np.setdiff1d(np.arange(flat.shape[0]), slots[1:])
            np.testing.assert_array_equal(cache.memory.reshape(-1, kv_heads, dim)[untouched],
                                          old.reshape(-1, kv_heads, dim)[untouched])


RAGGED = {
    "decode, one short sequence": ((1,), (0,)),
    "decode, full and nearly empty blocks": ((1, 1, 1), (15, 16, 130)),
    "decode of two or three tokens at once": ((2, 3), (40, 0)),
    "prefill": ((70, 5, 1, 131), (0, 0, 0, 0)),
    "chunk on top of cached tokens": ((33, 100), (95, 7)),
    "prefill and decode mixed": ((1, 40, 1, 64, 3), (200, 24, 0, 0, 61)),
}


@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("case", RAGGED)
@pytest.mark.parametrize("heads, kv_heads, dim", ((2, 2, 64), (4, 1, 80), (3, 3, 96), (8, 1, 128), (6, 2, 20)))
def test_attention_over_a_scattered_cache(kernels, cache_dtype, case, heads, kv_heads, dim):
    rng = np.random.default_rng(4)
    batch = Batch(rng, *RAGGED[case], block_size=16)
    shape = (batch.num_blocks, 16, kv_heads, dim)
    keys, values = weight(rng, shape, cache_dtype, 1.0), weight(rng, shape, cache_dtype, 1.0)
    q = rng.standard_normal((batch.tokens, heads * dim)).astype(np.float32)
    got = call("attention", (q, keys, values, batch.query_lens, batch.context_lens, batch.tables), q.shape)
    wanted = attention(q.astype(np.float64), keys, values, batch.query_lens, batch.context_lens, batch.tables)
    assert relative_error(got, wanted) < tolerance(F32, cache_dtype)


def layer_twin(x, batch, layer, cos, sin, heads, kv_heads, dim):
    *qkv_params, wo, norm2, w1, w3, w2, keys, values = layer
    q, k, v = qkv(x, qkv_params, cos, sin, batch.positions, heads, kv_heads, dim)
    for cache, new in ((keys, k), (values, v)):
        cache.memory.reshape(-1, kv_heads, dim)[batch.slots] = Stored(new, cache.dtype).memory
    x = x + linear(attention(q, keys, values, batch.query_lens, batch.context_lens, batch.tables), wo)
    normed = rmsnorm(x, norm2, EPS)
    return x + linear(silu(linear(normed, w1)) * linear(normed, w3), w2)


class StackCase:
    """A random network of two layers and a batch for it; `inputs` are those of the operator `decoder`."""

    hidden, inner, heads, kv_heads, dim = 48, 72, 6, 2, 8

    def __init__(self, dtype, cache_dtype, lens, cached):
        rng = np.random.default_rng(5)
        hidden, inner, vocab, layers = self.hidden, self.inner, 101, 2
        heads, kv_heads, dim = self.heads, self.kv_heads, self.dim
        self.batch = Batch(rng, lens, cached, block_size=16)
        self.cos, self.sin = rope(1200, dim)
        self.table, self.norm, self.head = (weight(rng, (vocab, hidden), dtype, 1.0), weight(rng, hidden, dtype, 1.0),
                                            weight(rng, (vocab, hidden), dtype, 0.1))
        shape = (self.batch.num_blocks, 16, kv_heads, dim)
        self.layers = [[*qkv_weights(rng, hidden, heads, kv_heads, dim, dtype),
                        weight(rng, (hidden, heads * dim), dtype),
                        weight(rng, hidden, dtype, 1.0), weight(rng, (inner, hidden), dtype),
                        weight(rng, (inner, hidden), dtype),
                        weight(rng, (hidden, inner), dtype), weight(rng, shape, cache_dtype, 1.0),
                        weight(rng, shape, cache_dtype, 1.0)] for _ in range(layers)]
        self.ids = rng.integers(0, vocab, self.batch.tokens).astype(np.int32)
        self.logits_shape = (len(lens), vocab)
        self.binding = 0

    @property
    def inputs(self):
        batch = self.batch
        return (self.ids, batch.positions, batch.slots, batch.query_lens, batch.context_lens, batch.tables,
                np.array([EPS], np.float32), np.array([self.binding], np.int32), self.cos, self.sin, self.table,
                self.norm,
                self.head, *(p for layer in self.layers for p in layer))

    def twin(self):
        x = self.table.values[self.ids]
        for layer in self.layers:
            x = layer_twin(x, self.batch, layer, self.cos, self.sin, self.heads, self.kv_heads, self.dim)
        return linear(rmsnorm(x[np.cumsum(self.batch.query_lens) - 1], self.norm, EPS), self.head)


@pytest.mark.parametrize("cache_dtype", (F32, BF16))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lens, cached", (((1,), (9,)), ((1, 1, 1), (0, 20, 33)), ((40, 3, 1), (0, 8, 50)),
                                          ((1100, 30), (0, 5))))
def test_whole_stack_equals_its_layers(kernels, dtype, cache_dtype, lens, cached):
    case = StackCase(dtype, cache_dtype, lens, cached)
    got = call("decoder", case.inputs, case.logits_shape)
    caches = [layer[-1].values for layer in case.layers]
    assert relative_error(got, case.twin()) < 3 * tolerance(dtype, cache_dtype)
    for layer, written in zip(case.layers, caches):
        assert relative_error(written, layer[-1].values) < 3 * max(tolerance(dtype), 8e-3 if cache_dtype == BF16 else 0)


@pytest.mark.parametrize("lens, cached", (((1, 1, 1), (0, 20, 130)), ((70, 3, 1), (0, 8, 50))))
def test_calls_from_several_threads_while_the_team_changes_size(kernels, lens, cached):
    case, callers, repeats = StackCase(F32, F32, lens, cached), 3, 20
    if os.environ.get(COMMAND):
        call("decoder", case.inputs, case.logits_shape, callers, repeats)  # the driver compares the outputs
        return
    wanted, before, done = call("decoder", case.inputs, case.logits_shape), load().threads, threading.Event()

    def resize():
        while not done.is_set():
            for count in (1, 2, 3, 4):
                load().threads = count

    resizer = threading.Thread(target=resize)
    resizer.start()
    try:
        with ThreadPoolExecutor(callers) as pool:
            results = list(pool.map(lambda _: call("decoder", case.inputs, case.logits_shape),
                                    range(callers * repeats)))
    finally:
        done.set()
        resizer.join()
        load().threads = before
    for result in results:
        np.testing.assert_array_equal(result, wanted)


@pytest.fixture
def binding(kernels):
    """A number to keep a network's weights under; the driver has them only during a call."""
    if os.environ.get(COMMAND):
        pytest.skip("the weights have to stay where they are between calls")
    number = kernels.open_binding()
    yield number
    kernels.close_binding(number)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cached", ((9,), (0, 20, 33)))
def test_a_decode_on_kept_weights_equals_the_whole_stack(kernels, binding, dtype, cached):
    case = StackCase(dtype, F32, (1,) * len(cached), cached)
    case.binding = binding
    wanted = call("decoder", case.inputs, case.logits_shape)
    held = [value.memory if isinstance(value, Stored) else value for value in case.inputs[8:]]
    assert kernels.bound_addresses(binding) == [memory.ctypes.data for memory in held]
    got = call("decode", [np.array([binding], np.int32), decode_rows(case), case.head], case.logits_shape)
    np.testing.assert_array_equal(got, wanted)


def decode_rows(case):
    """The batch of a StackCase as `decode` takes it, with room for more blocks than there are."""
    batch = case.batch
    columns = [column[:, None] for column in (case.ids, batch.context_lens, batch.slots)]
    return np.concatenate([*columns, batch.tables, np.full((len(case.ids), 3), -1, np.int32)], 1).astype(np.int32)


HEADS = {"different rows": None, "rows that come again": lambda head: head[np.arange(len(head)) % 397],
         "zeros": lambda head: 0 * head, "infinite": lambda head: marked(head, 600, 0, np.inf),
         "NaN first": lambda head: marked(head, 0, 3, np.nan), "NaN last": lambda head: marked(head, -1, 3, np.nan)}


def marked(head, row, column, value):
    """One row of zeros but for one value: logits of which only that row's are not finite."""
    head[row] = 0
    head[row, column] = value
    return head


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("sequences", (1, 4, 11, 70))
def test_a_decode_says_which_logit_is_the_first_of_the_largest(kernels, threads, dtype, head, sequences):
    case = StackCase(dtype, F32, (1,) * sequences, (5,) * sequences)
    values = weight(np.random.default_rng(4), (1003, case.hidden), dtype).values
    case.head = Stored(values if HEADS[head] is None else HEADS[head](values), dtype)
    logits, largest = decode_kept(case.inputs, decode_rows(case), (sequences, 1003))
    np.testing.assert_array_equal(largest, first_of_the_largest(logits))
    assert (largest == -1).any() == ("NaN" in head) or head == "infinite"
    assert head != "zeros" or not largest.any()


def first_of_the_largest(logits):
    """`Network.largest` by NumPy."""
    return np.where(np.isfinite(logits.max(1)), logits.argmax(1), -1)


def test_decode_refuses_what_it_cannot_run_on(kernels, binding):
    case = StackCase(F32, F32, (1, 1), (9, 3))
    rows, number = decode_rows(case), np.array([binding], np.int32)

    def refused(why, rows=rows, number=number, head=case.head):
        with pytest.raises(RuntimeError, match=why):
            call("decode", [number, rows, head], case.logits_shape)

    refused("has not been given any weights")
    case.binding = binding
    call("decoder", case.inputs, case.logits_shape)
    refused("is not open", number=number + 1000)
    refused("head is not the one", head=Stored(case.head.values, F32))
    refused("head .* wanted", head=Stored(case.head.values[1:], F32))
    refused("no block table", rows=np.ascontiguousarray(rows[:, :3]))
    for column, value, why in ((0, -1, "ids"), (0, 10 ** 6, "ids"), (1, 0, "positions"), (1, 10 ** 6, "positions"),
                               (2, 10 ** 6, "slots"), (3, -1, "block table"), (3, 10 ** 6, "block table")):
        wrong = rows.copy()
        wrong[1, column] = value
        refused(why, rows=wrong)
    kernels.close_binding(binding)
    refused("is not open")
