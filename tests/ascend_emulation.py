"""Run MindFormers' own LlamaForCausalLM on a CPU: its Ascend primitives, and nothing else, replaced by their plain
definitions.

Each replacement takes its constants (eps, head counts, scale, layout) from the primitive it stands in for, so a network
that builds its primitives wrongly computes wrongly here too.
"""

import sys

import mindspore as ms
import numpy as np
from quantised_fixtures import unpack_int4
from qwen15.ascend import operators as plain
from qwen15.checkpoint import casting

_FLOATS = {ms.float32: "F32", ms.float16: "F16", ms.bfloat16: "BF16"}


def values(tensor) -> np.ndarray:
    """A Tensor's contents as a NumPy array; floats as float32. MindSpore's own Cast takes 10 ms for each new shape."""
    array = tensor.asnumpy()
    if tensor.dtype == ms.bfloat16:
        return casting.to_float32(array.view(np.uint16), "BF16")
    return array.astype(np.float32) if tensor.dtype == ms.float16 else array


def rounded(array: np.ndarray, like) -> ms.Tensor:
    """The result of an operator: computed in float32, rounded once to the dtype of its input `like`."""
    dtype = _FLOATS[like.dtype]
    return casting.to_tensor(casting.from_float32(np.ascontiguousarray(array, np.float32), dtype), dtype)


def emulate(cell) -> dict:
    """Replace the Ascend primitives of `cell` (PyNative mode) and return how many of each were replaced."""
    counts = {}
    for _, part in cell.cells_and_names():
        for name, primitive in list(part._primitives.items()):
            make = _REPLACEMENTS.get(primitive.name)
            if make is not None:
                object.__setattr__(part, name, _Standin(primitive, make(primitive)))
                counts[primitive.name] = counts.get(primitive.name, 0) + 1
    _emulate_cumsum(cell)
    return counts


class _Standin:
    """Called like the primitive, with the primitive's name for whoever looks."""

    def __init__(self, primitive, compute):
        self.name = primitive.name
        self._compute = compute

    def __call__(self, *inputs):
        return self._compute(*inputs)


def _rms_norm(primitive):
    """In half precision every step rounds, the worst that an operator may do: MindFormers is to hand it float32."""
    def compute(x, gamma):
        if x.dtype == ms.float32:
            return rounded(plain.rms_norm(values(x), values(gamma), primitive.epsilon), x), None
        mean_square = values(rounded(np.mean(values(rounded(np.square(values(x)), x)), axis=-1, keepdims=True), x))
        normed = values(rounded(values(x) / values(rounded(np.sqrt(mean_square + primitive.epsilon), x)), x))
        return rounded(normed * values(gamma), x), None
    return compute


def _silu(_):
    return lambda x: rounded(plain.silu(values(x)), x)


def _rotary(primitive):
    if primitive.cos_format != 2:
        raise ValueError(f"cos_format {primitive.cos_format} is not the half-split rotation")

    def compute(query, key, cos, sin, lengths):
        turned = plain.apply_rotary_pos_emb(*(values(x) for x in (query, key, cos, sin, lengths)))
        return rounded(turned[0], query), rounded(turned[1], key)
    return compute


def _reshape_and_cache(_):
    def compute(key, value, key_cache, value_cache, slots):
        caches = [values(cache).copy() for cache in (key_cache, value_cache)]
        plain.reshape_and_cache(values(key), values(value), *caches, values(slots))
        for parameter, cache in zip((key_cache, value_cache), caches):
            parameter.set_data(rounded(cache, parameter))
        return key
    return compute


def _flash_attention(primitive):
    if primitive.init_attrs["input_layout"] != "TH":
        raise ValueError(f"layout {primitive.init_attrs['input_layout']} is not TH")

    def compute(query, key, value, real_shift, drop_mask, padding_mask, mask, prefix, query_lens, kv_lens):
        if any(x is not None for x in (real_shift, drop_mask, padding_mask, prefix)):
            raise ValueError("an input that prediction does not use is given")
        out = plain.flash_attention(*(values(x) for x in (query, key, value, mask, query_lens, kv_lens)),
                                    primitive.head_num, primitive.scale_value)
        return None, None, None, rounded(out, query)
    return compute


def _paged_attention(primitive):
    def compute(query, key_cache, value_cache, tables, lengths):
        out = plain.paged_attention(*(values(x) for x in (query, key_cache, value_cache, tables, lengths)),
                                    primitive.head_num, primitive.kv_head_num, primitive.scale_value)
        return rounded(out, query)
    return compute


def _matmul(primitive):
    """MatMul has no bfloat16 kernel on a CPU; the sum is float32, as on Ascend. Other dtypes use the real one."""
    def compute(x, weight):
        if x.dtype != ms.bfloat16:
            return primitive(x, weight)
        right = values(weight).T if primitive.transpose_b else values(weight)
        return rounded(values(x) @ right, x)
    return compute


def _weight_quant_matmul(primitive):
    """Integers of 4 bits come packed; sums are float32, as on Ascend."""
    def compute(x, weight, scale, offset=None, *others):
        if any(other is not None for other in others):
            raise ValueError("an input that this project does not use is given")
        integers, group = weight.asnumpy(), primitive.antiquant_group_size
        if weight.dtype == ms.qint4x2:
            integers = unpack_int4(integers)
        if group:
            if primitive.transpose_weight or group not in (64, 128):
                raise ValueError(f"transpose_weight {primitive.transpose_weight}, group {group}")
            if scale.shape[0] * group != integers.shape[0]:
                raise ValueError(f"scales {scale.shape} for groups of {group}")
        elif not primitive.transpose_weight or weight.dtype == ms.qint4x2:
            raise ValueError("without groups it is 8 bits, rows with one scale each")
        given = None if offset is None else values(offset)
        return rounded(plain.weight_quant_matmul(values(x), integers, values(scale), given,
                                                 primitive.transpose_weight), x)
    return compute


def _gather(primitive):
    """Gather has no bfloat16 kernel on a CPU; going through float32 is exact. Other dtypes use the real one."""
    def compute(table, indices, axis):
        if table.dtype != ms.bfloat16:
            return primitive(table, indices, axis)
        return rounded(np.take(values(table), indices.asnumpy(), axis), table)
    return compute


def _elementwise(primitive):
    """Mul and Add, which MindSpore 2.7 lacks in bfloat16 on a CPU: float32 rounded once. Other dtypes use the real
    one."""
    def compute(*inputs):
        if all(x.dtype != ms.bfloat16 for x in inputs):
            return primitive(*inputs)
        by_name = {"Mul": np.multiply, "Add": np.add}
        return rounded(by_name[primitive.name](*map(values, inputs)), next(x for x in inputs if x.dtype == ms.bfloat16))
    return compute


_REPLACEMENTS = {"RmsNorm": _rms_norm, "SiLU": _silu, "ApplyRotaryPosEmb": _rotary,
                 "ReshapeAndCache": _reshape_and_cache,
                 "FlashAttentionScore": _flash_attention, "PagedAttention": _paged_attention, "MatMul": _matmul,
                 "Gather": _gather,
                 "WeightQuantBatchMatmul": _weight_quant_matmul, "Mul": _elementwise, "Add": _elementwise}


def _emulate_cumsum(cell) -> None:
    """`mint.cumsum` picks each prompt's last token in prefill; it has no CPU kernel."""
    module = sys.modules[type(cell).__module__]
    if not hasattr(module, "mint"):
        return

    class Mint:
        def __getattr__(self, name):
            return getattr(ms.mint, name)

        @staticmethod
        def cumsum(x, axis):
            return ms.Tensor(np.cumsum(x.asnumpy(), axis).astype(np.int32))

    module.mint = Mint()
