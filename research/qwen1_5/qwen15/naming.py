"""THE table of weights: Hugging Face name, MindSpore name, shape, and how tensor parallelism cuts each one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Dict, Iterator, Optional, Tuple

REPLICATED, COLUMN, ROW, VOCAB = "replicated", "column", "row", "vocab"
"""How a weight is cut over ranks: not at all, along its outputs (axis 0), along its inputs (axis 1), or along the
vocabulary (axis 0, only with `vocab_emb_dp: False`)."""


@dataclass(frozen=True)
class Dims:
    """The sizes that fix every weight's shape.

    Attributes:
        hidden_size: E, width of the residual stream.
        intermediate_size: F, width of the gated MLP.
        num_layers: L.
        num_heads: H, query heads.
        num_kv_heads: K, key/value heads; H is a multiple of K.
        head_dim: D, width of one head.
        vocab_size: V, rows of the embedding, padding rows included.
        tie_word_embeddings: the head is the embedding itself and has no weight of its own.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool

    def size(self, symbol: str) -> int:
        """The number a shape symbol of `TABLE` stands for: E, F, V, HD (= H x D) or KD (= K x D)."""
        return {"E": self.hidden_size, "F": self.intermediate_size, "V": self.vocab_size,
                "HD": self.num_heads * self.head_dim, "KD": self.num_kv_heads * self.head_dim}[symbol]


@dataclass(frozen=True)
class Row:
    """One line of `TABLE`; `{}` in the names is the layer."""

    hf: str
    ms: str
    shape: Tuple[str, ...]
    cut: str


TABLE = (
    Row("model.embed_tokens.weight", "model.tok_embeddings.embedding_weight", ("V", "E"), VOCAB),
    Row("model.layers.{}.input_layernorm.weight", "model.layers.{}.attention_norm.weight", ("E",), REPLICATED),
    Row("model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.attention.wq.weight", ("HD", "E"), COLUMN),
    Row("model.layers.{}.self_attn.q_proj.bias", "model.layers.{}.attention.wq.bias", ("HD",), COLUMN),
    Row("model.layers.{}.self_attn.k_proj.weight", "model.layers.{}.attention.wk.weight", ("KD", "E"), COLUMN),
    Row("model.layers.{}.self_attn.k_proj.bias", "model.layers.{}.attention.wk.bias", ("KD",), COLUMN),
    Row("model.layers.{}.self_attn.v_proj.weight", "model.layers.{}.attention.wv.weight", ("KD", "E"), COLUMN),
    Row("model.layers.{}.self_attn.v_proj.bias", "model.layers.{}.attention.wv.bias", ("KD",), COLUMN),
    Row("model.layers.{}.self_attn.o_proj.weight", "model.layers.{}.attention.wo.weight", ("E", "HD"), ROW),
    Row("model.layers.{}.post_attention_layernorm.weight", "model.layers.{}.ffn_norm.weight", ("E",), REPLICATED),
    Row("model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.feed_forward.w1.weight", ("F", "E"), COLUMN),
    Row("model.layers.{}.mlp.up_proj.weight", "model.layers.{}.feed_forward.w3.weight", ("F", "E"), COLUMN),
    Row("model.layers.{}.mlp.down_proj.weight", "model.layers.{}.feed_forward.w2.weight", ("E", "F"), ROW),
    Row("model.norm.weight", "model.norm_out.weight", ("E",), REPLICATED),
    Row("lm_head.weight", "lm_head.weight", ("V", "E"), VOCAB),
)

EMBEDDING = TABLE[0]
HEAD = TABLE[-1]


@dataclass(frozen=True)
class Weight:
    """One weight of one model: a row of the table with the layer and the sizes filled in.

    Attributes:
        hf: name in a Hugging Face checkpoint.
        ms: name in a MindSpore checkpoint; it is also the Parameter's name in the network.
        shape: the whole weight's shape.
        cut: how it is cut, one of REPLICATED, COLUMN, ROW, VOCAB.
        layer: the layer's number, None outside the layers.
    """

    hf: str
    ms: str
    shape: Tuple[int, ...]
    cut: str
    layer: Optional[int]

    def axis(self, parts: int, vocab_emb_dp: bool) -> Optional[int]:
        """The axis cut into `parts` equal slices, or None where every rank keeps the whole weight.

        The axes are those of MindFormers' LlamaForCausalLM: `vocab_emb_dp` True, or a vocabulary that `parts` does not
        divide, leaves embedding and head whole.
        """
        if parts == 1 or self.cut == REPLICATED:
            return None
        if self.cut == VOCAB:
            return None if vocab_emb_dp or self.shape[0] % parts else 0
        return 1 if self.cut == ROW else 0

    def slice_shape(self, parts: int, vocab_emb_dp: bool) -> Tuple[int, ...]:
        """Shape of one rank's slice. The caller has checked that `parts` divides (see `indivisible`)."""
        axis = self.axis(parts, vocab_emb_dp)
        return tuple(size // parts if i == axis else size for i, size in enumerate(self.shape))


def weights(dims: Dims) -> Iterator[Weight]:
    """Every weight of a model of these sizes, in the network's order; the head is absent when it is tied."""
    for row in TABLE:
        if row is EMBEDDING:
            yield _weight(row, dims, None)
    for layer in range(dims.num_layers):
        for row in TABLE:
            if "{}" in row.hf:
                yield _weight(row, dims, layer)
    for row in TABLE:
        if "{}" not in row.hf and row is not EMBEDDING and not (row is HEAD and dims.tie_word_embeddings):
            yield _weight(row, dims, None)


def _weight(row: Row, dims: Dims, layer: Optional[int]) -> Weight:
    shape = tuple(dims.size(symbol) for symbol in row.shape)
    return Weight(row.hf.format(layer), row.ms.format(layer), shape, row.cut, layer)


_TO_MS: Dict[str, str] = {row.hf: row.ms for row in TABLE}
_TO_HF: Dict[str, str] = {row.ms: row.hf for row in TABLE}
_LAYER = re.compile(r"^(model\.layers\.)(0|[1-9][0-9]*)(\..+)$")


def _rename(name: str, table: Dict[str, str]) -> Optional[str]:
    match = _LAYER.match(name)
    if match is None:
        return table.get(name)
    row = table.get(f"{match[1]}{{}}{match[3]}")
    return None if row is None else row.format(match[2])


def hf_to_ms(name: str) -> Optional[str]:
    """MindSpore's name of a Hugging Face weight, None when the table has no such weight."""
    return _rename(name, _TO_MS)


def ms_to_hf(name: str) -> Optional[str]:
    """Hugging Face's name of a MindSpore weight, None when the table has no such weight."""
    return _rename(name, _TO_HF)


def indivisible(dims: Dims, parts: int) -> Optional[str]:
    """Why a model of these sizes cannot be cut over `parts` ranks, with the arithmetic; None when it can."""
    for label, size in (("num_heads", dims.num_heads), ("n_kv_heads", dims.num_kv_heads),
                        ("hidden_size", dims.hidden_size), ("intermediate_size", dims.intermediate_size)):
        if size % parts:
            return (f"{label} {size} is not divisible by model_parallel {parts} "
                    f"({size} = {parts} x {size // parts} + {size % parts})")
    return None
