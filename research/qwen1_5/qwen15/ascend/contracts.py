"""What is taken for granted of each Ascend operator, tried one by one on the device, and what it may do instead.

Each contract runs one operator as MindFormers' network calls it and compares the result with the plain definition.
Where they differ, the result is compared with other readings of the contract too: one report says what to change.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Iterator, Mapping

import numpy as np

from ..network.base import rope_tables
from ..network.weight_quant import pack_int4
from . import operators as plain

PROMPT_TOKENS = (1, 37, 16, 80)
TABLE_ROWS = 256
HEAD_DIMS = (64, 128)
"""Head sizes of the models: 64 for 0.5B, 128 for the larger ones."""
_BLOCK_SIZE, _HEADS, _KV_HEADS, _EPS, _THETA, _GROUP = 16, 4, 2, 1e-6, 1e6, 64


@dataclass(frozen=True)
class Contract:
    """One thing taken for granted.

    Attributes:
        name: the operator and what is asked of it.
        device: the device's result, float32.
        expected: the plain definition's.
        otherwise: another reading of the contract -> what the operator computes if that one is right.
    """

    name: str
    device: np.ndarray
    expected: np.ndarray
    otherwise: Mapping[str, np.ndarray] = field(default_factory=dict)


def contracts(dtype: str, head_dim: int, prepare: Callable[[Any], Any]) -> Iterator[Contract]:
    """Run every operator on the device.

    Args:
        dtype: of the activations, 'bfloat16' or 'float16'.
        head_dim: D.
        prepare: called with each cell before it runs.
    """
    run = _Runner(dtype, head_dim, prepare)
    if head_dim == HEAD_DIMS[0]:  # these operators have no head dimension
        yield from (run.rms_norm(), run.silu(), run.int8_matmul(), run.int8_groups_matmul(), run.int4_matmul())
    yield from run.rotary_prefill()
    yield from run.rotary_decode()
    yield run.flash_attention()
    yield from run.write_cache()
    yield run.paged_attention()


def scattered(lengths: np.ndarray, block_size: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Block tables (B, `width`), padded with -1, of blocks neither in order nor neighbours, and all slots (T,)."""
    needed = [-(-int(length) // block_size) for length in lengths]
    blocks = iter(np.random.default_rng(2).permutation(2 * sum(needed)))
    tables = np.full((len(lengths), width), -1, np.int32)
    slots = []
    for row, (length, count) in enumerate(zip(lengths, needed)):
        tables[row, :count] = [next(blocks) for _ in range(count)]
        positions = np.arange(length)
        slots.append(tables[row, positions // block_size] * block_size + positions % block_size)
    return tables, np.concatenate(slots).astype(np.int32)


class _Runner:
    """Random inputs that the dtype holds exactly, and one method an operator."""

    def __init__(self, dtype: str, head_dim: int, prepare: Callable[[Any], Any]):
        import mindspore as ms

        self._ms, self._kind, self._prepare = ms, getattr(ms, dtype), prepare
        self._head_dim, self._scale = head_dim, head_dim ** -0.5
        self._random = np.random.default_rng(1)
        self._lengths = np.asarray(PROMPT_TOKENS, np.int32)
        tokens, batch = int(self._lengths.sum()), len(self._lengths)
        # The value MindFormers writes at masked positions, by dtype.
        self._mask = plain.causal_mask(1.0 if dtype == "bfloat16" else -10000.0)
        width, kv_width = _HEADS * head_dim, _KV_HEADS * head_dim
        self._q, self._k, self._v = (self._normal(1, tokens, size) for size in (width, kv_width, kv_width))
        self._new_q, self._new_k = self._normal(batch, 1, width), self._normal(batch, 1, kv_width)
        self._cos, self._sin = (self._array(self._tensor(table))
                                for table in rope_tables(TABLE_ROWS, head_dim, _THETA))

    def _tensor(self, array: np.ndarray) -> Any:
        return self._ms.Tensor(np.ascontiguousarray(array)).astype(self._kind)

    def _array(self, tensor: Any) -> np.ndarray:
        return tensor.astype(self._ms.float32).asnumpy()

    def _normal(self, *shape: int) -> np.ndarray:
        """Random float32 values that the dtype holds exactly."""
        return self._array(self._tensor(self._random.normal(size=shape).astype(np.float32)))

    def _run(self, primitive: Any, *inputs: Any) -> Any:
        """The primitive's outputs, run as a graph of its own."""
        from mindspore import nn

        class Operator(nn.Cell):
            """One operator."""

            def __init__(self):
                super().__init__()
                self.operator = primitive

            def construct(self, *inputs):
                """Call it."""
                return self.operator(*inputs)

        cell = Operator()
        self._prepare(cell)
        return cell(*inputs)

    def _named(self, name: str) -> str:
        return f"{name}, heads of {self._head_dim}"

    def rms_norm(self) -> Contract:
        """MindFormers computes norms in float32; eps counts, for some rows are as small as its root."""
        from mindspore.ops import operations as P

        x, gamma = self._q[0].copy(), self._random.uniform(0.5, 1.5, self._q.shape[-1]).astype(np.float32)
        x[::2] *= 1e-3
        normed, _ = self._run(P.RmsNorm(_EPS), self._ms.Tensor(x), self._ms.Tensor(gamma))
        root = np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True))
        return Contract("RmsNorm in float32", self._array(normed), plain.rms_norm(x, gamma, _EPS),
                        {"eps is not added inside the root": x / root * gamma})

    def silu(self) -> Contract:
        """The gate's activation."""
        from mindspore.ops import operations as P

        x = self._q[0]
        return Contract("SiLU", self._array(self._run(P._inner_ops.SiLU(), self._tensor(x))), plain.silu(x))

    def int8_matmul(self) -> Contract:
        """A16W8: rows with one scale each."""
        outputs, inputs = 96, 128
        weight = self._random.integers(-128, 128, (outputs, inputs)).astype(np.int8)
        scale, offset = self._scales(outputs), self._random.integers(-20, 20, outputs).astype(np.float32)
        x = self._normal(5, inputs)
        ours = self._matmul(True, 0, x, self._ms.Tensor(weight), scale, offset)
        return Contract("WeightQuantBatchMatmul int8", ours, plain.weight_quant_matmul(x, weight, scale, offset, True),
                        {"the offset is subtracted": plain.weight_quant_matmul(x, weight, scale, -offset, True),
                         "the offset is left out": plain.weight_quant_matmul(x, weight, scale, None, True),
                         "the offset is added after the scale": x @ (weight * scale[:, None] + offset[:, None]).T})

    def int8_groups_matmul(self) -> Contract:
        """A16W8 in groups: each group of inputs has a scale and an offset of its own."""
        outputs, inputs = 96, 4 * _GROUP
        weight = self._random.integers(-128, 128, (inputs, outputs)).astype(np.int8)
        scale, offset = self._scales(4, outputs), self._random.integers(-20, 20, (4, outputs)).astype(np.float32)
        x = self._normal(5, inputs)
        ours = self._matmul(False, _GROUP, x, self._ms.Tensor(weight), scale, offset)
        first_scale, first_offset = (np.repeat(array[:1], 4, axis=0) for array in (scale, offset))
        return Contract("WeightQuantBatchMatmul int8 in groups", ours,
                        plain.weight_quant_matmul(x, weight, scale, offset, False),
                        {"the first group's scale and offset count for all":
                         plain.weight_quant_matmul(x, weight, first_scale, first_offset, False),
                         "the offset is subtracted": plain.weight_quant_matmul(x, weight, scale, -offset, False),
                         "the offset is left out": plain.weight_quant_matmul(x, weight, scale, None, False)})

    def int4_matmul(self) -> Contract:
        """A16W4: groups of inputs with one scale each, two columns to a byte."""
        outputs, inputs = 96, 4 * _GROUP
        values = self._random.integers(-8, 8, (inputs, outputs)).astype(np.int8)
        scale, offset = self._scales(4, outputs), self._random.integers(-4, 4, (4, outputs)).astype(np.float32)
        x = self._normal(5, inputs)
        packed = self._ms.Tensor(pack_int4(values), dtype=self._ms.qint4x2)
        ours = self._matmul(False, _GROUP, x, packed, scale, offset)
        swapped = values.reshape(inputs, -1, 2)[:, :, ::-1].reshape(values.shape)
        return Contract("WeightQuantBatchMatmul int4", ours, plain.weight_quant_matmul(x, values, scale, offset, False),
                        {"the even column lies in the high nibble":
                         plain.weight_quant_matmul(x, swapped, scale, offset, False),
                         "the offset is subtracted": plain.weight_quant_matmul(x, values, scale, -offset, False),
                         "nibbles are 0..15": plain.weight_quant_matmul(x, values & 15, scale, offset, False)})

    def _scales(self, *shape: int) -> np.ndarray:
        return self._array(self._tensor(self._random.uniform(0.01, 0.02, shape).astype(np.float32)))

    def _matmul(self, transposed: bool, group: int, x: np.ndarray, weight: Any, scale: np.ndarray,
                offset: np.ndarray) -> np.ndarray:
        from mindspore.ops.auto_generate import WeightQuantBatchMatmul

        matmul = WeightQuantBatchMatmul(False, transposed, group)
        return self._array(self._run(matmul, self._tensor(x), weight, self._tensor(scale), self._tensor(offset),
                                     None, None, None))

    def _rotated(self, query: np.ndarray, key: np.ndarray, cos: np.ndarray, sin: np.ndarray, lengths: np.ndarray
                 ) -> tuple[np.ndarray, ...]:
        from mindspore import ops

        turned = self._run(ops.ApplyRotaryPosEmb(2), *map(self._tensor, (query, key, cos, sin)),
                           self._ms.Tensor(lengths))
        return tuple(self._array(tensor) for tensor in turned)

    def rotary_prefill(self) -> Iterator[Contract]:
        """The whole table and the lengths of the sequences: positions begin anew with every sequence."""
        tokens = int(self._lengths.sum())
        ours = self._rotated(self._q, self._k, self._cos, self._sin, self._lengths)
        expected = plain.apply_rotary_pos_emb(self._q, self._k, self._cos, self._sin, self._lengths)
        running = plain.apply_rotary_pos_emb(self._q, self._k, self._cos, self._sin, np.asarray([tokens]))
        for index, name in enumerate(("queries", "keys")):
            x = (self._q, self._k)[index]
            positions = np.concatenate([np.arange(length) for length in self._lengths])
            pairs = _rotate_pairs(x, self._cos[positions], self._sin[positions])
            yield Contract(self._named(f"ApplyRotaryPosEmb prefill {name}"), ours[index], expected[index],
                           {"positions run on through all sequences": running[index],
                            "neighbours are rotated, not halves": pairs, "nothing is rotated": x})

    def rotary_decode(self) -> Iterator[Contract]:
        """As many rows of the table as sequences tell that this is decode; row b is for sequence b, also for one."""
        for rows in (slice(None), slice(-1, None)):
            query, key, lengths = self._new_q[rows], self._new_k[rows], self._lengths[rows]
            cos, sin = self._cos[lengths - 1], self._sin[lengths - 1]
            ours = self._rotated(query, key, cos, sin, lengths)
            expected = plain.apply_rotary_pos_emb(query, key, cos, sin, lengths)
            for index, name in enumerate(("queries", "keys")):
                x = (query, key)[index]
                other = {"neighbours are rotated, not halves": _rotate_pairs(x, cos, sin),
                         "nothing is rotated, or all by the row of the first sequence": x}
                yield Contract(self._named(f"ApplyRotaryPosEmb decode of {len(query)}, {name}"), ours[index],
                               expected[index], other)

    def flash_attention(self) -> Contract:
        """The lengths are those of the sequences, and a 128 x 128 triangle stands for a causal mask of any size."""
        from mindspore.ops.operations.nn_ops import FlashAttentionScore

        attention = FlashAttentionScore(head_num=_HEADS, keep_prob=1.0, scale_value=self._scale, pre_tokens=2147483647,
                                        next_tokens=0, inner_precise=0, input_layout="TH", sparse_mode=0)
        inputs = (self._q[0], self._k[0], self._v[0])

        def on_device(lengths: np.ndarray) -> np.ndarray:
            given = self._ms.Tensor(lengths)
            return self._array(self._run(attention, *map(self._tensor, inputs), None, None, None,
                                         self._tensor(self._mask), None, given, given)[3])

        def plainly(lengths: np.ndarray = self._lengths, scale: float = self._scale,
                    query: np.ndarray = inputs[0]) -> np.ndarray:
            return plain.flash_attention(query, *inputs[1:], self._mask, lengths, lengths, _HEADS, scale)

        expected = plainly()
        other = {"sequences see each other, all lengths taken as one": plainly(np.asarray([self._lengths.sum()])),
                 "query head h reads KV head h mod K": self._dealt(plainly(query=self._dealt(inputs[0]))),
                 "the scale is 1": plainly(scale=1.0),
                 "nothing is masked": self._unmasked(inputs)}
        ours = on_device(self._lengths)
        if np.abs(ours - expected).max() > 0.1 * np.abs(expected).max():
            other.update(self._other_input("it is right when it is given lengths added up", ours, expected,
                                           lambda: on_device(np.cumsum(self._lengths).astype(np.int32))))
        return Contract(self._named("FlashAttentionScore"), ours, expected, other)

    def _other_input(self, words: str, ours: np.ndarray, expected: np.ndarray, run: Callable[[], np.ndarray]
                     ) -> dict[str, np.ndarray]:
        """{words: what the device says now}, if it is right with another input; a reading that explains `ours`."""
        try:
            again = run()
        except RuntimeError:
            return {}
        return {words: ours} if np.abs(again - expected).max() < 0.05 * np.abs(expected).max() else {}

    def _dealt(self, x: np.ndarray) -> np.ndarray:
        """Heads 0, 1, 2, 3 as 0, 2, 1, 3; twice is as before."""
        return x.reshape(len(x), _KV_HEADS, _HEADS // _KV_HEADS, -1).swapaxes(1, 2).reshape(x.shape)

    def _unmasked(self, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
        """Every token of a sequence sees the whole sequence."""
        out, start = [], 0
        for length in self._lengths:
            q, k, v = (x[start:start + length].reshape(length, -1, self._head_dim) for x in inputs)
            k, v = (np.repeat(x, _HEADS // _KV_HEADS, axis=1) for x in (k, v))
            scores = np.einsum("thd,lhd->htl", q, k) * self._scale
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out.append(np.einsum("htl,lhd->thd", scores / scores.sum(axis=-1, keepdims=True), v).reshape(length, -1))
            start += length
        return np.concatenate(out)

    def _caches(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tables, slots and a cache with something in it."""
        tables, slots = scattered(self._lengths, _BLOCK_SIZE, TABLE_ROWS // _BLOCK_SIZE)
        return tables, slots, self._normal(int(tables.max()) + 2, _BLOCK_SIZE, _KV_HEADS, self._head_dim)

    def write_cache(self) -> Iterator[Contract]:
        """ReshapeAndCache: token t goes to slot `slots[t]` of blocks in no order; a token with slot -1 goes nowhere."""
        from mindspore import Parameter, nn, ops

        _, slots, cache = self._caches()
        slots = slots.copy()
        slots[-1] = -1  # the last slot: a token written elsewhere cannot overwrite it

        class Caching(nn.Cell):
            """The operator, which writes into parameters."""

            def __init__(self, key_cache, value_cache):
                super().__init__()
                self.key_cache = Parameter(key_cache, name="key_cache", requires_grad=False)
                self.value_cache = Parameter(value_cache, name="value_cache", requires_grad=False)
                self.operator = ops.auto_generate.ReshapeAndCache()

            def construct(self, key, value, slots):
                """Write."""
                return self.operator(key, value, self.key_cache, self.value_cache, slots)

        cell = Caching(self._tensor(cache), self._tensor(cache))
        self._prepare(cell)
        cell(self._tensor(self._k), self._tensor(self._v), self._ms.Tensor(slots))

        def plainly(slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            written = cache.copy(), cache.copy()
            plain.reshape_and_cache(self._k, self._v, *written, slots)
            return written

        expected = plainly(slots)
        readings = {"slot -1 is the last slot": plainly(np.where(slots < 0, cache.shape[0] * _BLOCK_SIZE - 1, slots)),
                    "slot -1 is slot 0": plainly(np.where(slots < 0, 0, slots)),
                    "blocks are filled in their order": plainly(np.arange(len(slots))),
                    "nothing is written": (cache, cache)}
        for index, (name, held) in enumerate((("keys", cell.key_cache), ("values", cell.value_cache))):
            yield Contract(self._named(f"ReshapeAndCache {name}"), self._array(held), expected[index],
                           {reading: written[index] for reading, written in readings.items()})

    def paged_attention(self) -> Contract:
        """One new token of each sequence; the length counts it, and its key is in the cache already."""
        from mindspore import ops

        tables, slots, cache = self._caches()
        keys, values = cache, cache.copy()
        plain.reshape_and_cache(self._k, self._v, keys, values, slots)
        paged = ops.auto_generate.PagedAttention(_HEADS, self._scale, _KV_HEADS)
        ours = self._array(self._run(paged, self._tensor(self._new_q), self._tensor(keys), self._tensor(values),
                                     self._ms.Tensor(tables), self._ms.Tensor(self._lengths)))

        def plainly(tables: np.ndarray = tables, lengths: np.ndarray = self._lengths,
                    query: np.ndarray = self._new_q) -> np.ndarray:
            return plain.paged_attention(query, keys, values, tables, lengths, _HEADS, _KV_HEADS, self._scale)

        in_order = np.where(tables >= 0, np.arange(tables.shape[1]), -1).astype(np.int32)
        return Contract(
            self._named("PagedAttention"), ours, plainly(),
            {"the length counts one token less than it says": plainly(lengths=np.maximum(self._lengths - 1, 1)),
             "the table is not read, blocks are taken in order": plainly(in_order),
             "query head h reads KV head h mod K":
             self._dealt(plainly(query=self._dealt(self._new_q[:, 0])[:, None])[:, 0])[:, None]})


def _rotate_pairs(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Neighbouring numbers rotated with each other, as GPT-J does; the table's halves are equal."""
    half = cos.shape[1] // 2
    heads = x.reshape(len(cos), -1, half, 2)
    c, s = cos[:, None, :half], sin[:, None, :half]
    turned = heads[..., 0] * c - heads[..., 1] * s, heads[..., 1] * c + heads[..., 0] * s
    return np.stack(turned, axis=-1).reshape(x.shape)
