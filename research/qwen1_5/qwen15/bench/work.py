"""What a step of the network has to do at least: bytes it reads from memory and operations it computes."""

from __future__ import annotations

from typing import Optional

from .. import naming
from ..generation.memory import ITEM_BYTES
from ..naming import Dims


def matrix_elements(dims: Dims) -> int:
    """Elements of all matrices a token is multiplied with: every layer's and the head's, not the embedding's rows."""
    total = dims.hidden_size * dims.vocab_size
    for weight in naming.weights(dims):
        if len(weight.shape) == 2 and weight.cut != naming.VOCAB:
            total += weight.shape[0] * weight.shape[1]
    return total


def decode_bytes(dims: Dims, dtype: str, batch: int, context: float, quantised_bytes: Optional[int] = None) -> float:
    """Bytes a decode step reads: all matrices once, keys and values of `batch` sequences of `context` tokens.

    Args:
        dtype: of matrices and cache.
        quantised_bytes: of the matrices, where they are quantised.
    """
    cache = 2 * dims.num_layers * dims.num_kv_heads * dims.head_dim * context * batch
    matrices = ITEM_BYTES[dtype] * matrix_elements(dims) if quantised_bytes is None else quantised_bytes
    return matrices + ITEM_BYTES[dtype] * cache


def decode_flop(dims: Dims, batch: int, context: float) -> float:
    """Operations of one decode step, a multiplication and an addition counted as two."""
    return 2.0 * batch * (matrix_elements(dims) + 2 * dims.num_layers * dims.num_heads * dims.head_dim * context)


def prefill_flop(dims: Dims, tokens: int) -> float:
    """Operations of prefilling one prompt: causal attention, and the head for the last token alone."""
    head = dims.hidden_size * dims.vocab_size
    attention = dims.num_layers * dims.num_heads * dims.head_dim * tokens * (
        tokens + 1)  # QK^T and PV over t keys, t = 1 ... T
    return 2.0 * (tokens * (matrix_elements(dims) - head) + head + attention)
