"""Our Qwen2 network for the CPU, on one page; parameters bear MindFormers' names, arithmetic belongs to the operators."""

from types import ModuleType
from typing import Callable, Tuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.common import np_dtype

from ..naming import Dims

Source = Callable[[str], Tensor]
"""Gives the value of a parameter by its MindSpore name (this rank's slice). A network can only be built from one, so no
parameter ever has a value that did not come from the checkpoint."""


def zeros(shape: Tuple[int, ...], dtype: str) -> Tensor:
    """Zeros whose memory the operating system hands out page by page as it is first written: a cache costs what is used."""
    if dtype == "bfloat16":
        return Tensor.from_numpy(np.zeros(shape, np.uint16).view(np_dtype.bfloat16))
    return Tensor.from_numpy(np.zeros(shape, dtype))


class Weight(nn.Cell):
    """A named place for parameters: `<path>.<name>` for each of `names`."""

    def __init__(self, source: Source, path: str, names: Tuple[str, ...] = ("weight",)):
        super().__init__(auto_prefix=False)
        for name in names:
            # By position, and straight from the call: Parameter takes over the Tensor's memory only when nothing else
            # refers to it, and a keyword argument (or a variable) makes it copy.
            setattr(self, name, Parameter(source(f"{path}.{name}"), f"{path}.{name}", False))


class Attention(nn.Cell):
    """Self-attention with grouped queries over a paged KV cache."""

    def __init__(self, source: Source, path: str, operators: ModuleType, dims: Dims, ranks: int, eps: float,
                 cache_shape: Tuple[int, int], compute_dtype: str):
        super().__init__(auto_prefix=False)
        heads, kv_heads = dims.num_heads // ranks, dims.num_kv_heads // ranks
        self.wq = Weight(source, f"{path}.wq", ("weight", "bias"))
        self.wk = Weight(source, f"{path}.wk", ("weight", "bias"))
        self.wv = Weight(source, f"{path}.wv", ("weight", "bias"))
        self.wo = Weight(source, f"{path}.wo")
        cache = (*cache_shape, kv_heads, dims.head_dim)  # (num_blocks, block_size, K, D)
        dtype = operators.cache_dtype(compute_dtype)
        self.key_cache = Parameter(zeros(cache, dtype), f"{path}.key_cache", False)
        self.value_cache = Parameter(zeros(cache, dtype), f"{path}.value_cache", False)
        self.qkv = operators.Qkv(eps, heads, kv_heads, dims.head_dim, compute_dtype)
        self.attend = operators.Attention(heads, kv_heads, dims.head_dim)
        self.project = _Residual(operators, ranks)

    def construct(self, x, norm, cos, sin, positions, slots, query_lens, context_lens, block_tables):
        q = self.qkv(x, norm, self.wq.weight, self.wq.bias, self.wk.weight, self.wk.bias, self.wv.weight, self.wv.bias,
                     cos, sin, positions, slots, self.key_cache, self.value_cache)  # (T, H*D)
        attended = self.attend(q, self.key_cache, self.value_cache, query_lens, context_lens, block_tables)
        return self.project(attended, self.wo.weight, x)


class FeedForward(nn.Cell):
    """Gated MLP: w2(silu(w1 x) * w3 x)."""

    def __init__(self, source: Source, path: str, operators: ModuleType, ranks: int, eps: float):
        super().__init__(auto_prefix=False)
        self.w1 = Weight(source, f"{path}.w1")
        self.w3 = Weight(source, f"{path}.w3")
        self.w2 = Weight(source, f"{path}.w2")
        self.gate_up = operators.GateUp(eps)
        self.project = _Residual(operators, ranks)

    def construct(self, x, norm):
        return self.project(self.gate_up(x, norm, self.w1.weight, self.w3.weight), self.w2.weight, x)


class _Residual(nn.Cell):
    """x + y w^T; under tensor parallelism the product of the row-parallel slices is summed over the ranks in float32."""

    def __init__(self, operators: ModuleType, ranks: int):
        super().__init__(auto_prefix=False)
        self.ranks = ranks
        if ranks == 1:
            self.project_add = operators.ProjectAdd()
        else:
            self.project = operators.Project()
            self.sum_over_ranks = ops.AllReduce()

    def construct(self, y, w, x):
        if self.ranks == 1:
            return self.project_add(y, w, x)
        return x + self.sum_over_ranks(self.project(y, w))


class DecoderLayer(nn.Cell):
    """Attention and MLP, each behind its RMSNorm and added to the residual stream."""

    def __init__(self, source: Source, path: str, operators: ModuleType, dims: Dims, ranks: int, eps: float,
                 cache_shape: Tuple[int, int], compute_dtype: str):
        super().__init__(auto_prefix=False)
        self.attention_norm = Weight(source, f"{path}.attention_norm")
        self.attention = Attention(source, f"{path}.attention", operators, dims, ranks, eps, cache_shape, compute_dtype)
        self.ffn_norm = Weight(source, f"{path}.ffn_norm")
        self.feed_forward = FeedForward(source, f"{path}.feed_forward", operators, ranks, eps)

    def construct(self, x, cos, sin, positions, slots, query_lens, context_lens, block_tables):
        x = self.attention(x, self.attention_norm.weight, cos, sin, positions, slots, query_lens, context_lens, block_tables)
        return self.feed_forward(x, self.ffn_norm.weight)

    def in_order(self) -> Tuple[Parameter, ...]:
        """The layer's parameters and caches as an operator for the whole stack takes them."""
        a, f = self.attention, self.feed_forward
        return (self.attention_norm.weight, a.wq.weight, a.wq.bias, a.wk.weight, a.wk.bias, a.wv.weight, a.wv.bias, a.wo.weight,
                self.ffn_norm.weight, f.w1.weight, f.w3.weight, f.w2.weight, a.key_cache, a.value_cache)


class Embedding(nn.Cell):
    """ids -> rows; with the vocabulary split over ranks each rank gives its own rows, zeros for the others, and they are summed."""

    def __init__(self, source: Source, path: str, operators: ModuleType, split: bool, rank: int, rows: int):
        super().__init__(auto_prefix=False)
        self.embedding_weight = Parameter(source(f"{path}.embedding_weight"), f"{path}.embedding_weight", False)
        self.look_up = operators.Embed()
        self.split = split
        if split:
            self.first, self.rows = rank * rows, rows
            self.sum_over_ranks = ops.AllReduce()

    def construct(self, ids):
        if not self.split:
            return self.look_up(ids, self.embedding_weight)
        local = ids - self.first
        mine = ops.logical_and(local >= 0, local < self.rows)
        x = self.look_up(ops.clamp(local, 0, self.rows - 1), self.embedding_weight)
        return self.sum_over_ranks(x * mine.astype(ms.float32).expand_dims(1))


class LlamaModel(nn.Cell):
    """Embedding and decoder layers."""

    def __init__(self, source: Source, operators: ModuleType, dims: Dims, ranks: int, rank: int, split_vocab: bool, eps: float,
                 cache_shape: Tuple[int, int], compute_dtype: str):
        super().__init__(auto_prefix=False)
        self.tok_embeddings = Embedding(source, "model.tok_embeddings", operators, split_vocab, rank,
                                        dims.vocab_size // ranks)
        self.layers = nn.CellList([
            DecoderLayer(source, f"model.layers.{i}", operators, dims, ranks, eps, cache_shape, compute_dtype)
            for i in range(dims.num_layers)], auto_prefix=False)
        self.norm_out = Weight(source, "model.norm_out")

    def construct(self, ids, cos, sin, positions, slots, query_lens, context_lens, block_tables):
        x = self.tok_embeddings(ids)  # (T, E) float32
        for layer in self.layers:
            x = layer(x, cos, sin, positions, slots, query_lens, context_lens, block_tables)
        return x


class LlamaForCausalLM(nn.Cell):
    """ids of a flat batch (T,) -> logits (B, V) float32 of each sequence's last token.

    Args:
        source: gives each parameter's value by name; see `Source`.
        operators: the operator set (see `qwen15.ops`).
        dims: the whole model's sizes.
        ranks, rank: tensor parallelism; every rank holds H/ranks heads, K/ranks KV heads and F/ranks MLP columns.
        split_vocab: embedding and head are split along the vocabulary (`vocab_emb_dp: False`).
        eps: RMSNorm's epsilon.
        rope: cos and sin tables (P, D) float32, P the longest sequence.
        cache_shape: (num_blocks, block_size) of the paged KV cache.
        compute_dtype: dtype of the KV cache's values.
    """

    def __init__(self, source: Source, operators: ModuleType, dims: Dims, eps: float, rope: Tuple[Tensor, Tensor],
                 cache_shape: Tuple[int, int], compute_dtype: str, ranks: int = 1, rank: int = 0, split_vocab: bool = False):
        super().__init__(auto_prefix=False)
        self.model = LlamaModel(source, operators, dims, ranks, rank, split_vocab, eps, cache_shape, compute_dtype)
        self.tied = dims.tie_word_embeddings
        if not self.tied:
            self.lm_head = Weight(source, "lm_head")
        self.cos = Parameter(rope[0], name="rope.cos", requires_grad=False)
        self.sin = Parameter(rope[1], name="rope.sin", requires_grad=False)
        self.head = operators.Head(eps)
        self.split_vocab = split_vocab
        self.ranks = ranks
        if split_vocab:
            self.gather_ranks = ops.AllGather()
        # One operator for the whole stack where the set has one and no rank has to be heard in between.
        self.fused = ranks == 1 and hasattr(operators, "Decoder")
        if self.fused:
            self.binding = operators.Binding()
            self.decoder = operators.Decoder(eps, self.binding)
            w = self.model.tok_embeddings.embedding_weight
            head = w if self.tied else self.lm_head.weight
            self.held = ParameterTuple([self.cos, self.sin, w, self.model.norm_out.weight, head] +
                                       [p for layer in self.model.layers for p in layer.in_order()])

    def construct(self, ids, positions, slots, query_lens, context_lens, block_tables):
        w = self.model.tok_embeddings.embedding_weight if self.tied else self.lm_head.weight
        if self.fused:
            return self.decoder(ids, positions, slots, query_lens, context_lens, block_tables, self.held)
        x = self.model(ids, self.cos, self.sin, positions, slots, query_lens, context_lens, block_tables)
        logits = self.head(x, query_lens, self.model.norm_out.weight, w)
        if self.split_vocab:
            slices = self.gather_ranks(logits).reshape(self.ranks, -1, w.shape[0])  # (ranks, B, V/ranks)
            logits = slices.transpose(1, 0, 2).reshape(-1, self.ranks * w.shape[0])
        return logits


class Decode(nn.Cell):
    """rows (B, 3 + M) int32 -> logits (B, V): `network` with one new token for each sequence, by the operator set's `Decode`.

    It runs on the parameters and caches that the network's last call has passed; see there for rows.
    """

    def __init__(self, operators: ModuleType, network: LlamaForCausalLM):
        super().__init__(auto_prefix=False)
        self.head = network.model.tok_embeddings.embedding_weight if network.tied else network.lm_head.weight
        self.decode = operators.Decode(network.binding)

    def construct(self, rows):
        return self.decode(rows, self.head)
