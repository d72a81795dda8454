"""The published sizes of the dense Qwen1.5 family, and which of them a set of sizes looks like."""

from __future__ import annotations

from typing import Dict, Mapping, Optional

from .naming import Dims


def _dims(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int,
          tied: bool = False) -> Dims:
    return Dims(hidden_size=hidden, intermediate_size=intermediate, num_layers=layers, num_heads=heads,
                num_kv_heads=kv_heads, head_dim=hidden // heads, vocab_size=vocab, tie_word_embeddings=tied)


FAMILY: Dict[str, Dims] = {
    "0.5B": _dims(1024, 2816, 24, 16, 16, 151936, tied=True),
    "1.8B": _dims(2048, 5504, 24, 16, 16, 151936),
    "4B": _dims(2560, 6912, 40, 20, 20, 151936),
    "7B": _dims(4096, 11008, 32, 32, 32, 151936),
    "14B": _dims(5120, 13696, 40, 40, 40, 152064),
    "32B": _dims(5120, 27392, 64, 40, 8, 152064),
    "72B": _dims(8192, 24576, 80, 64, 64, 152064),
    "110B": _dims(8192, 49152, 80, 64, 8, 152064),
}
"""Sizes as in each model's published config.json, base and chat alike."""


def yaml_name(size: str) -> str:
    """The shipped base YAML of a size: `0.5B` -> `predict_qwen1_5_0_5b.yaml`."""
    return f"predict_qwen1_5_{size.lower().replace('.', '_')}.yaml"


def looks_like(sizes: Mapping[str, int]) -> Optional[str]:
    """The one family member that `sizes` (some fields of `Dims`, by name) points to, None when none or several do.

    Width and depth decide: a mistyped head count or vocabulary still finds its model.
    """
    telling = {name: sizes[name] for name in ("hidden_size", "intermediate_size", "num_layers") if name in sizes}
    scores = {size: sum(getattr(dims, name) == value for name, value in telling.items())
              for size, dims in FAMILY.items()}
    best = max(scores.values())
    winners = [size for size, score in scores.items() if score == best]
    return winners[0] if best >= min(2, len(telling)) and best > 0 and len(winners) == 1 else None
