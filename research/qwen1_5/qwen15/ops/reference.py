"""The operators in plain MindSpore, in float32 or better: the definition of right for the fused kernels.

Weights and KV cache are held in float32 because MindSpore's CPU backend has no bfloat16 operators but Cast (and reads
float16 weights seven times slower than float32). Holding a bfloat16 or float16 weight in float32 is exact; a cache kept
in less than float32 is imitated by rounding what is written to it. A quantised weight is dequantised to float32 each
time.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import nn, ops


def weight_dtype(param_init_type: str) -> str:
    """dtype in which weights of `param_init_type` are held."""
    return "float32"


def cache_dtype(compute_dtype: str) -> str:
    """dtype in which the KV cache is held."""
    return "float32"


def compute_in(compute_dtype: str) -> None:
    """Always as accurate as can be."""


def together(rank: int, ranks: int) -> str:
    """Why ranks do not share memory here."""
    return "reference operators"


class Embed(nn.Cell):
    """Rows of the embedding: (T,) -> (T, E)."""

    def __init__(self):
        super().__init__()
        self.dense = _Dense()

    def construct(self, ids, table):
        if len(table) == 1:
            return ops.gather(table[0], ids, 0)
        return self.dense(tuple([ops.gather(part, ids, 0) for part in table]))


class _Dense(nn.Cell):
    """A matrix as one float32 tensor (O, I): scale * (q - zero) where it is quantised, columns as they are stored.

    4 bits (uint8): of every 16 bytes, eight little-endian 16-bit words, bits 4k to 4k + 3 of word l are value 8k + l;
    their zero point is 8 where none is stored, that of 8 bits (int8) 0.
    """

    def construct(self, parts):
        if len(parts) == 1:
            return parts[0]
        q, scale = ops.cast(parts[0], ms.int32), ops.cast(parts[1], ms.float32)  # (O, I) or (O, I/2); (O, G)
        rows, groups = scale.shape
        middle = 0
        if parts[0].dtype == ms.uint8:
            middle = 8
            words = q.reshape(rows, -1, 8, 2)
            low, high = words[:, :, :, 0], words[:, :, :, 1]  # (O, I/32, 8)
            q = ops.stack((low % 16, low // 16, high % 16, high // 16), 2).reshape(rows, -1)  # (O, I)
        q = q.reshape(rows, groups, -1)
        if len(parts) > 2 and parts[2].dtype != ms.int32:
            q = q - ops.cast(parts[2], ms.int32).expand_dims(2)
        else:
            q = q - middle
        return (ops.cast(q, ms.float32) * scale.expand_dims(2)).reshape(rows, -1)


class _Linear(nn.Cell):
    """x (T, I) times w (O, I) transposed -> (T, O), summed in float64 and rounded once.

    A first token's MLP has single activations thousands of times the others (Sun et al., 2024, arXiv:2402.17762):
    MatMul's own float32 sums over them moved the logits of a small real model by 1.5e-4. Right comes before fast here:
    this takes twice as long.
    """

    def __init__(self):
        super().__init__()
        self.dense = _Dense()
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x, w):
        if len(w) > 2 and w[-1].dtype == ms.int32:  # stored column j belongs to input order[j]
            x = ops.gather(x, w[-1], 1)
        return ops.cast(self.matmul(ops.cast(x, ms.float64), ops.cast(self.dense(w), ms.float64)), ms.float32)


class _RMSNorm(nn.Cell):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, the mean in float64 (Zhang and Sennrich, 2019,
    arXiv:1910.07467)."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def construct(self, x, weight):
        wide = ops.cast(x, ms.float64)
        return ops.cast(wide * ops.rsqrt(ops.mean(wide * wide, -1, True) + self.eps), ms.float32) * weight


class Qkv(nn.Cell):
    """RMSNorm of x (T, E), q/k/v projections with bias, rotary embedding (half-split), and k and v written into the
    KV cache at `slots` (T,); gives q (T, H*D)."""

    def __init__(self, eps: float, num_heads: int, num_kv_heads: int, head_dim: int, compute_dtype: str):
        super().__init__()
        self.norm = _RMSNorm(eps)
        self.linear = _Linear()
        self.heads, self.kv_heads, self.dim = num_heads, num_kv_heads, head_dim
        self.rounded = getattr(ms, compute_dtype)
        self.scatter = ops.ScatterNdUpdate()

    def rotate(self, x, cos, sin):
        """x (T, heads, D): the pair (x[i], x[i + D/2]) turns by its angle (Su et al., 2021, arXiv:2104.09864)."""
        half = self.dim // 2
        turned = ops.concat((-x[:, :, half:], x[:, :, :half]), -1)
        return x * cos + turned * sin

    def construct(self, x, norm, wq, bq, wk, bk, wv, bv, cos, sin, positions, slots, key_cache, value_cache):
        x = self.norm(x, norm)
        q = (self.linear(x, wq) + bq).reshape(-1, self.heads, self.dim)
        k = (self.linear(x, wk) + bk).reshape(-1, self.kv_heads, self.dim)
        v = (self.linear(x, wv) + bv).reshape(-1, self.kv_heads, self.dim)
        cos = ops.gather(cos, positions, 0).expand_dims(1)  # (T, 1, D)
        sin = ops.gather(sin, positions, 0).expand_dims(1)
        q = self.rotate(q, cos, sin)
        k = self.rotate(k, cos, sin)
        block_size = key_cache.shape[1]
        index = ops.stack((slots // block_size, slots % block_size), 1)
        k = ops.cast(ops.cast(k, self.rounded), ms.float32)
        v = ops.cast(ops.cast(v, self.rounded), ms.float32)
        # The cache must be written before attention reads it: make the result depend on the write.
        q = ops.depend(q, self.scatter(key_cache, index, k))
        q = ops.depend(q, self.scatter(value_cache, index, v))
        return q.reshape(-1, self.heads * self.dim)


class Attention(nn.Cell):
    """softmax(q k^T / sqrt(D)) v over each token's own sequence, read from the paged cache, in float64.

    Every token is scored against every cached token of the batch, and a mask leaves those of its own sequence up to its
    own position: wasteful, and impossible to get subtly wrong.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__()
        self.heads, self.kv_heads, self.dim = num_heads, num_kv_heads, head_dim
        self.group = num_heads // num_kv_heads
        self.scale = head_dim ** -0.5
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.weigh = ops.BatchMatMul()

    def construct(self, q, key_cache, value_cache, query_lens, context_lens, block_tables):
        tokens = q.shape[0]
        block_size = key_cache.shape[1]
        capacity = block_tables.shape[1] * block_size  # cached tokens that a block table has room for
        blocks = ops.maximum(block_tables.reshape(-1), 0)
        q = ops.cast(q, ms.float64)
        shape = (-1, self.kv_heads, self.dim)  # (B * capacity, K, D)
        k = ops.cast(ops.gather(key_cache, blocks, 0).reshape(shape), ms.float64)
        v = ops.cast(ops.gather(value_cache, blocks, 0).reshape(shape), ms.float64)

        ends = ops.cumsum(query_lens, 0)
        token = ops.arange(0, tokens, 1).astype(ms.int32)
        sequence = (token.expand_dims(1) >= ends.expand_dims(0)).astype(ms.int32).sum(1)  # (T,)
        position = token - ops.gather(ends - context_lens, sequence, 0)
        cached = ops.arange(0, k.shape[0], 1).astype(ms.int32)  # (B * capacity,)
        own = sequence.expand_dims(1) == (cached // capacity).expand_dims(0)
        past = position.expand_dims(1) >= (cached % capacity).expand_dims(0)
        visible = ops.logical_and(own, past)  # (T, B * capacity)

        q = q.reshape(-1, self.kv_heads, self.group, self.dim).transpose(1, 0, 2, 3)
        q = q.reshape(self.kv_heads, -1, self.dim)
        s = self.scores(q, k.transpose(1, 0, 2)) * self.scale  # (K, T * group, B * capacity)
        s = s.reshape(self.kv_heads, -1, self.group, k.shape[0])
        s = ops.where(visible.expand_dims(0).expand_dims(2), s, ms.Tensor(-1e30, ms.float64))
        p = ops.softmax(s, -1).reshape(self.kv_heads, -1, k.shape[0])
        out = self.weigh(p, v.transpose(1, 0, 2))  # (K, T * group, D)
        out = out.reshape(self.kv_heads, -1, self.group, self.dim).transpose(1, 0, 2, 3)
        return ops.cast(out.reshape(-1, self.heads * self.dim), ms.float32)


class Project(nn.Cell):
    """x (T, I) times w (O, I) transposed: (T, O)."""

    def __init__(self):
        super().__init__()
        self.linear = _Linear()

    def construct(self, x, w):
        return self.linear(x, w)


class ProjectAdd(nn.Cell):
    """residual (T, O) + x (T, I) times w (O, I) transposed."""

    def __init__(self):
        super().__init__()
        self.linear = _Linear()

    def construct(self, x, w, residual):
        return residual + self.linear(x, w)


class GateUp(nn.Cell):
    """RMSNorm of x (T, E), then silu(x w1^T) * (x w3^T): (T, F) (SwiGLU; Shazeer, 2020, arXiv:2002.05202)."""

    def __init__(self, eps: float):
        super().__init__()
        self.norm = _RMSNorm(eps)
        self.linear = _Linear()

    def construct(self, x, norm, w1, w3):
        x = self.norm(x, norm)
        gate = self.linear(x, w1)
        return gate * ops.sigmoid(gate) * self.linear(x, w3)


class Head(nn.Cell):
    """Logits (B, V) of each sequence's last token: final RMSNorm, then the output projection."""

    def __init__(self, eps: float):
        super().__init__()
        self.norm = _RMSNorm(eps)
        self.linear = _Linear()

    def construct(self, x, query_lens, norm, w):
        last = ops.gather(x, ops.cumsum(query_lens, 0) - 1, 0)
        return self.linear(self.norm(last, norm), w)
