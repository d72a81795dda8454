"""The seam between machines: one interface, our network on a CPU and MindFormers' LlamaForCausalLM on Ascend."""

from __future__ import annotations

from typing import Optional, Tuple

import numpy as np

from ..checkpoint.origin import Likeness


class Network:
    """What the engine drives.

    Attributes:
        vocab_size: V, columns of the logits.
        rank, ranks: this process among the tensor-parallel ones.
        supports_cached_prefill: `prefill` may continue sequences that are partly in the KV cache (context_lens >
            query_lens).
        note: one line on what runs where.
        quantised_bytes: what a step reads of quantised weights, in bytes; None where they are not quantised.
    """

    vocab_size: int
    rank: int = 0
    ranks: int = 1
    supports_cached_prefill: bool = True
    note: str = ""
    quantised_bytes: Optional[int] = None

    def prefill(self, input_ids: np.ndarray, query_lens: np.ndarray, context_lens: np.ndarray, block_tables: np.ndarray,
                slot_mapping: np.ndarray) -> np.ndarray:
        """Run the new tokens of B sequences and return logits (B, V) float32 of each one's last token.

        Args:
            input_ids: (T,) int32, the sequences' new tokens one after another, without padding.
            query_lens: (B,) int32, new tokens of each sequence; they sum to T.
            context_lens: (B,) int32, length of each sequence, the new tokens included.
            block_tables: (B, M) int32, blocks of each sequence in order, padded with -1.
            slot_mapping: (T,) int32, cache slot of each new token.
        """
        raise NotImplementedError

    def decode(self, input_ids: np.ndarray, context_lens: np.ndarray, block_tables: np.ndarray,
               slot_mapping: np.ndarray) -> np.ndarray:
        """`prefill` with one new token for each sequence: input_ids, context_lens and slot_mapping are (B,).

        Ctrl-C is held back in here where a framework runs that takes it, and put back where none does:
        `interrupts.held` costs 0.15 ms.
        """
        raise NotImplementedError

    def largest(self, logits: np.ndarray) -> Optional[np.ndarray]:
        """(B,) int32: the first id of each row's largest logit, -1 where that is infinite or a logit is NaN.

        Only for what the last `decode` returned, and only where it has found them on the way; None otherwise.
        """
        return None

    def agree(self, ids: np.ndarray) -> np.ndarray:
        """Rank 0's `ids` (N,) int32 on every rank; the other ranks pass an array of the same size."""
        return ids

    def likeness(self) -> Optional[Likeness]:
        """What every rank has to hold alike, of this one; None where there is no checkpoint."""
        return None

    def find_non_finite(self) -> Optional[str]:
        """Name of the first weight with NaN or infinity, None when all are finite. Reads every weight."""
        return None


def rope_tables(length: int, head_dim: int, theta: float) -> Tuple[np.ndarray, np.ndarray]:
    """cos and sin (length, head_dim) float32 of the angles position * theta^(-2i/head_dim), i repeated over both
    halves.

    Rounded to float32 where Hugging Face's Qwen2 rounds (exponent, power, reciprocal, angle): at position 30 000 one
    unit in the last place of a frequency is 2e-3 of a turn's radian.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    power = np.power(theta, exponent.astype(np.float64)).astype(np.float32)
    inverse = np.float32(1.0) / power
    angles = np.arange(length, dtype=np.float32)[:, None] * inverse[None, :]
    angles = np.concatenate((angles, angles), axis=1)
    return np.cos(angles), np.sin(angles)
