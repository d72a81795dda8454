"""Plain NumPy definitions of the Ascend operators that MindFormers' network is made of: what each must compute.

They serve as the operators when the network runs on a CPU in the tests, and as the judge of the real operators when
`ascend_check` runs on a card. All take and return float32 values; rounding to the operator's dtype is the caller's.
Letters: B sequences, T tokens of all sequences one after another, H query heads, K KV heads, D head size, M blocks.
"""

from __future__ import annotations

from typing import Optional, Tuple

import numpy as np

MASK_SIZE = 128
"""Rows and columns of the triangle that stands for a causal mask of any length in the TH layout."""


def rms_norm(x: np.ndarray, gamma: np.ndarray, eps: float) -> np.ndarray:
    """RmsNorm(eps): x / sqrt(mean(x^2) + eps) * gamma over the last axis; x (..., E), gamma (E,)."""
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + eps) * gamma


def silu(x: np.ndarray) -> np.ndarray:
    """SiLU: x / (1 + exp(-x))."""
    return x / (1.0 + np.exp(-x))


def apply_rotary_pos_emb(query: np.ndarray, key: np.ndarray, cos: np.ndarray, sin: np.ndarray, lengths: np.ndarray
                         ) -> Tuple[np.ndarray, np.ndarray]:
    """ApplyRotaryPosEmb(2): rotate halves, (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

    Args:
        query: (1, T, H*D) in prefill, (B, 1, H*D) in decode.
        key: the same with K*D.
        cos, sin: (P, D), the table of all positions, in prefill; (B, D), each sequence's own position, in decode.
        lengths: (B,); in prefill they sum to T and every sequence's positions start at 0. Not read in decode.
    """
    batch, steps, _ = query.shape
    if cos.shape[0] == batch and steps == 1:
        rows_cos, rows_sin = cos, sin
    else:
        if batch != 1 or int(np.sum(lengths)) != steps:
            raise ValueError(f"prefill of {query.shape[:2]} tokens, but the lengths {lengths.tolist()} sum to "
                             f"{int(np.sum(lengths))}")
        positions = np.concatenate([np.arange(length) for length in lengths])
        rows_cos, rows_sin = cos[positions], sin[positions]
    return _rotate(query, rows_cos, rows_sin), _rotate(key, rows_cos, rows_sin)


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    head_dim = cos.shape[1]
    heads = x.reshape(len(cos), -1, head_dim)
    first, second = np.split(heads, 2, axis=-1)
    turned = heads * cos[:, None] + np.concatenate((-second, first), axis=-1) * sin[:, None]
    return turned.reshape(x.shape)


def weight_quant_matmul(x: np.ndarray, weight: np.ndarray, scale: np.ndarray, offset: Optional[np.ndarray],
                        transpose_weight: bool) -> np.ndarray:
    """WeightQuantBatchMatmul: x ((weight + offset) scale), the weight turned into numbers first.

    Args:
        x: (T, I).
        weight: integers, (O, I) with `transpose_weight`, otherwise (I, O); 4-bit ones unpacked, -8..7.
        scale, offset: (O,) with `transpose_weight`, otherwise (G, O), each row for I / G inputs; offset None is 0.
        transpose_weight: whether the weight lies as (O, I).
    """
    numbers = (weight.T if transpose_weight else weight).astype(np.float32)
    scale = scale.reshape(-1, numbers.shape[1])
    repeat = numbers.shape[0] // scale.shape[0]
    if offset is not None:
        numbers = numbers + np.repeat(offset.reshape(scale.shape), repeat, axis=0)
    return x @ (numbers * np.repeat(scale, repeat, axis=0))


def reshape_and_cache(key: np.ndarray, value: np.ndarray, key_cache: np.ndarray, value_cache: np.ndarray,
                      slots: np.ndarray) -> None:
    """ReshapeAndCache: write token t's key and value to slot `slots[t]` of the caches, in place, none where negative.

    Args:
        key, value: (1, T, K*D) or (B, 1, K*D).
        key_cache, value_cache: (num_blocks, block_size, K, D); slot = block * block_size + offset.
        slots: (T,) or (B,).
    """
    for rows, cache in ((key, key_cache), (value, value_cache)):
        rows = rows.reshape(len(slots), *cache.shape[2:])
        flat = cache.reshape(-1, *cache.shape[2:])
        used = slots >= 0
        flat[slots[used]] = rows[used]


def flash_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray, query_lens: np.ndarray,
                    kv_lens: np.ndarray, heads: int, scale: float) -> np.ndarray:
    """FlashAttentionScore, layout TH: causal attention inside each sequence of a flat batch.

    Args:
        query: (T, H*D).
        key, value: (T, K*D); query head h reads KV head h // (H / K).
        mask: (128, 128), non-zero strictly above the diagonal: the pattern of a causal mask of any length.
        query_lens, kv_lens: (B,), equal; they sum to T.
        heads: H.
        scale: factor of the scores, 1 / sqrt(D).
    """
    if mask.shape != (MASK_SIZE, MASK_SIZE) or not np.array_equal(mask != 0, np.triu(np.ones_like(mask), 1) != 0):
        raise ValueError("the mask is not a strict upper triangle of 128 x 128")
    if not np.array_equal(query_lens, kv_lens) or int(np.sum(query_lens)) != len(query):
        raise ValueError(f"{len(query)} tokens, lengths {query_lens.tolist()} and {kv_lens.tolist()}")
    head_dim = query.shape[1] // heads
    out = np.empty_like(query)
    start = 0
    for length in query_lens:
        rows = slice(start, start + int(length))
        out[rows] = _attend(query[rows].reshape(-1, heads, head_dim), key[rows].reshape(int(length), -1, head_dim),
                            value[rows].reshape(int(length), -1, head_dim), scale).reshape(int(length), -1)
        start += int(length)
    return out


def paged_attention(query: np.ndarray, key_cache: np.ndarray, value_cache: np.ndarray, block_tables: np.ndarray,
                    context_lens: np.ndarray, heads: int, kv_heads: int, scale: float) -> np.ndarray:
    """PagedAttention: one new token of each sequence attends to the first `context_lens[b]` tokens of its blocks.

    Args:
        query: (B, 1, H*D).
        key_cache, value_cache: (num_blocks, block_size, K, D); the new token is already in them.
        block_tables: (B, M), blocks in order, padded with -1.
        context_lens: (B,), the new token included.
        heads, kv_heads: H and K.
        scale: factor of the scores, 1 / sqrt(D).
    """
    block_size, head_dim = key_cache.shape[1], key_cache.shape[3]
    if key_cache.shape[2] != kv_heads or query.shape[-1] != heads * head_dim:
        raise ValueError(f"{heads} and {kv_heads} heads for query {query.shape} and cache {key_cache.shape}")
    out = np.empty_like(query)
    for row, length in enumerate(context_lens):
        blocks = block_tables[row, :-(-int(length) // block_size)]
        if np.any(blocks < 0):
            raise ValueError(f"sequence {row} has {int(length)} tokens and the block table "
                             f"{block_tables[row].tolist()}")
        keys = key_cache[blocks].reshape(-1, kv_heads, head_dim)[:length]
        values = value_cache[blocks].reshape(-1, kv_heads, head_dim)[:length]
        out[row] = _attend(query[row].reshape(1, heads, head_dim), keys, values, scale).reshape(1, -1)
    return out


def _attend(query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float) -> np.ndarray:
    """softmax(q k^T * scale) v for a sequence's last t tokens; (t, H, D), (L, K, D), (L, K, D) -> (t, H, D)."""
    repeat = query.shape[1] // key.shape[1]
    key, value = np.repeat(key, repeat, axis=1), np.repeat(value, repeat, axis=1)
    scores = np.einsum("thd,lhd->htl", query, key) * scale
    last = np.arange(len(key) - len(query), len(key))
    scores = np.where(np.arange(len(key))[None, :] <= last[:, None], scores, -np.inf)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("htl,lhd->thd", scores / scores.sum(axis=-1, keepdims=True), value)


def causal_mask(masked: float = 1.0) -> np.ndarray:
    """The triangle (128, 128) float32 that MindFormers hands over: `masked` above the diagonal, 0 elsewhere."""
    return np.triu(np.full((MASK_SIZE, MASK_SIZE), masked, np.float32), 1)
