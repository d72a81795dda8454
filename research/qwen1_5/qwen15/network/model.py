"""Our Qwen2 network for the CPU, on one page; parameters bear MindFormers' names, arithmetic belongs to the operators.

Shapes: B sequences, T tokens, H query heads, K key/value heads, D head size, E hidden size, F MLP columns, V
vocabulary; with several ranks H, K, F (and V where the vocabulary is split) are one rank's. Activations are float32.
A matrix goes to its
operator as a tuple: the weight alone, or a quantised weight with its scales, zero points and order.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Protocol, Tuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.common import np_dtype

from ..naming import Dims


class Values(Protocol):
    """Gives parameters their values. A network can only be built from one, so no parameter ever has a value that did
    not come from the checkpoint."""

    def parts(self, name: str) -> Tuple[str, ...]:
        """The parameters that weight `name` consists of: itself, and what belongs to it when it is quantised."""

    def __call__(self, name: str) -> Tensor:
        """The value of parameter `name`, this rank's slice."""


@dataclass(frozen=True)
class Args:
    """What the network's parts are built from.

    Attributes:
        values: gives each parameter's value by name.
        operators: the operator set (see `qwen15.ops`).
        dims: the whole model's sizes.
        eps: RMSNorm's epsilon.
        num_blocks, block_size: the paged KV cache's.
        compute_dtype: dtype of the KV cache's values.
        ranks, rank: tensor parallelism; every rank holds 1/ranks of the heads, KV heads and MLP columns.
        split_vocab: embedding and head are split along the vocabulary (`vocab_emb_dp: False`).
        together: the operator set adds over the ranks itself (see `ops`); otherwise MindSpore's collectives do.
    """

    values: Values
    operators: ModuleType
    dims: Dims
    eps: float
    num_blocks: int
    block_size: int
    compute_dtype: str
    ranks: int = 1
    rank: int = 0
    split_vocab: bool = False
    together: bool = False


class WeightParts(nn.Cell):
    """A named weight: `parts` is what its operator takes."""

    def __init__(self, args: Args, name: str):
        super().__init__(auto_prefix=False)
        # By position, and straight from the call: Parameter takes over the Tensor's memory only when nothing else
        # refers to it, and a keyword argument (or a variable) makes it copy.
        self.parts = ParameterTuple([Parameter(args.values(part), part, False) for part in args.values.parts(name)])


class RowParallel(nn.Cell):
    """x (T, O) + y (T, I) times w (O, I) transposed; the products of the ranks' slices are summed in float32."""

    def __init__(self, args: Args):
        super().__init__(auto_prefix=False)
        self.alone = args.ranks == 1
        if self.alone:
            self.project_add = args.operators.ProjectAdd()
        else:
            self.project = args.operators.Project()
            self.sum_over_ranks = ops.AllReduce()

    def construct(self, y, w, x):
        if self.alone:
            return self.project_add(y, w, x)
        return x + self.sum_over_ranks(self.project(y, w))


class DecoderLayer(nn.Cell):
    """Attention over the paged KV cache and the gated MLP, each behind its RMSNorm and added to the residual stream."""

    def __init__(self, args: Args, path: str):
        super().__init__(auto_prefix=False)
        heads, kv_heads = args.dims.num_heads // args.ranks, args.dims.num_kv_heads // args.ranks
        head_dim = args.dims.head_dim
        self.attention_norm = WeightParts(args, f"{path}.attention_norm.weight")
        self.wq, self.bq = (WeightParts(args, f"{path}.attention.wq.{name}") for name in ("weight", "bias"))
        self.wk, self.bk = (WeightParts(args, f"{path}.attention.wk.{name}") for name in ("weight", "bias"))
        self.wv, self.bv = (WeightParts(args, f"{path}.attention.wv.{name}") for name in ("weight", "bias"))
        self.wo = WeightParts(args, f"{path}.attention.wo.weight")
        self.ffn_norm = WeightParts(args, f"{path}.ffn_norm.weight")
        self.w1 = WeightParts(args, f"{path}.feed_forward.w1.weight")
        self.w3 = WeightParts(args, f"{path}.feed_forward.w3.weight")
        self.w2 = WeightParts(args, f"{path}.feed_forward.w2.weight")
        cache = (args.num_blocks, args.block_size, kv_heads, head_dim)
        dtype = args.operators.cache_dtype(args.compute_dtype)
        self.key_cache = Parameter(zeros(cache, dtype), f"{path}.attention.key_cache", False)
        self.value_cache = Parameter(zeros(cache, dtype), f"{path}.attention.value_cache", False)
        self.qkv = args.operators.Qkv(args.eps, heads, kv_heads, head_dim, args.compute_dtype)
        self.attend = args.operators.Attention(heads, kv_heads, head_dim)
        self.gate_up = args.operators.GateUp(args.eps)
        self.add = RowParallel(args)

    def construct(self, x, cos, sin, positions, slots, query_lens, context_lens, block_tables):
        q = self.qkv(x, self.attention_norm.parts[0], self.wq.parts, self.bq.parts[0], self.wk.parts, self.bk.parts[0],
                     self.wv.parts, self.bv.parts[0], cos, sin, positions, slots,
                     self.key_cache, self.value_cache)  # (T, H*D); keys and values go to the caches
        y = self.attend(q, self.key_cache, self.value_cache, query_lens, context_lens, block_tables)  # (T, H*D)
        x = self.add(y, self.wo.parts, x)  # (T, E)
        y = self.gate_up(x, self.ffn_norm.parts[0], self.w1.parts, self.w3.parts)  # (T, F)
        return self.add(y, self.w2.parts, x)  # (T, E)

    def in_order(self) -> Tuple[Parameter, ...]:
        """The layer's parameters and caches as an operator for the whole stack takes them."""
        weights = (self.attention_norm, self.wq, self.bq, self.wk, self.bk, self.wv, self.bv, self.wo,
                   self.ffn_norm, self.w1, self.w3, self.w2)
        return (*(part for weight in weights for part in weight.parts), self.key_cache, self.value_cache)


class Embedding(nn.Cell):
    """ids (T,) -> rows (T, E); where the vocabulary is split each rank gives its own and zeros, which are summed."""

    def __init__(self, args: Args):
        super().__init__(auto_prefix=False)
        self.look_up = args.operators.Embed()
        self.split = args.split_vocab
        if self.split:
            self.rows = args.dims.vocab_size // args.ranks
            self.first = args.rank * self.rows
            self.sum_over_ranks = ops.AllReduce()

    def construct(self, ids, table):
        if not self.split:
            return self.look_up(ids, table)  # (T, E)
        local = ids - self.first
        mine = ops.logical_and(local >= 0, local < self.rows)
        x = self.look_up(ops.clamp(local, 0, self.rows - 1), table)
        return self.sum_over_ranks(x * mine.astype(ms.float32).expand_dims(1))


class LlamaForCausalLM(nn.Cell):
    """ids of a flat batch (T,) -> logits (B, V) float32 of each sequence's last token.

    Args:
        args: see `Args`.
        rope: cos and sin tables (P, D) float32, P the longest sequence.
    """

    def __init__(self, args: Args, rope: Tuple[Tensor, Tensor]):
        super().__init__(auto_prefix=False)
        self.table = WeightParts(args, "model.tok_embeddings.embedding_weight")
        self.embed = Embedding(args)
        layers = [DecoderLayer(args, f"model.layers.{i}") for i in range(args.dims.num_layers)]
        self.layers = nn.CellList(layers, auto_prefix=False)
        self.norm_out = WeightParts(args, "model.norm_out.weight")
        self.lm_head = self.table if args.dims.tie_word_embeddings else WeightParts(args, "lm_head.weight")
        self.cos, self.sin = (Parameter(table, f"rope.{name}", False) for name, table in zip(("cos", "sin"), rope))
        self.head = args.operators.Head(args.eps)
        self.split_vocab, self.ranks, self.vocab_size = args.split_vocab, args.ranks, args.dims.vocab_size
        if args.split_vocab:
            self.gather_ranks = ops.AllGather()
        # One operator for the whole stack where this set has one that can also sum over ranks.
        self.fused = (args.ranks == 1 or args.together) and hasattr(args.operators, "Decoder")
        if self.fused:
            self.binding = args.operators.Binding(args.ranks, args.split_vocab)
            self.decoder = args.operators.Decoder(args.eps, self.binding)
            self.held = ParameterTuple(
                [self.cos, self.sin, *self.table.parts, *self.norm_out.parts, *self.lm_head.parts,
                 *(part for layer in self.layers for part in layer.in_order())])

    def construct(self, ids, positions, slots, query_lens, context_lens, block_tables):
        if self.fused:
            return self.decoder(ids, positions, slots, query_lens, context_lens, block_tables, self.held)
        x = self.embed(ids, self.table.parts)  # (T, E)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin, positions, slots, query_lens, context_lens, block_tables)
        logits = self.head(x, query_lens, self.norm_out.parts[0], self.lm_head.parts)  # (B, V)
        if self.split_vocab:
            logits = self.gather_ranks(logits).reshape(self.ranks, -1, self.vocab_size // self.ranks)
            logits = logits.transpose(1, 0, 2).reshape(-1, self.vocab_size)  # (ranks, B, V/ranks) -> (B, V)
        return logits


class Decode(nn.Cell):
    """rows (B, 3 + M) int32 -> logits (B, V): `network` with one new token for each sequence, by the set's `Decode`.

    It runs on the parameters and caches that the network's last call has passed; see there for rows.
    """

    def __init__(self, operators: ModuleType, network: LlamaForCausalLM):
        super().__init__(auto_prefix=False)
        self.lm_head = network.lm_head
        self.decode = operators.Decode(network.binding)

    def construct(self, rows):
        return self.decode(rows, self.lm_head.parts)


def zeros(shape: Tuple[int, ...], dtype: str) -> Tensor:
    """Zeros whose memory the system hands out page by page as it is first written: a cache costs what is used."""
    if dtype == "bfloat16":
        return Tensor.from_numpy(np.zeros(shape, np.uint16).view(np_dtype.bfloat16))
    return Tensor.from_numpy(np.zeros(shape, dtype))
