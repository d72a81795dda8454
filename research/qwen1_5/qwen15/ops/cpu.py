"""The operators as fused C++ kernels (qwen15/kernels), called by MindSpore's `ops.Custom` on the parameters' memory.

The tensors of a matrix follow one another among an operator's inputs; the kernels see by dtype and shape which is
which.
"""

from __future__ import annotations

from typing import List, Optional

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from .. import cluster
from ..errors import EXIT_FAILED, UserError
from ..kernels import library


def weight_dtype(param_init_type: str) -> str:
    """dtype in which weights of `param_init_type` are held: as they are."""
    return param_init_type


def cache_dtype(compute_dtype: str) -> str:
    """dtype in which the KV cache is held: as asked."""
    return compute_dtype


def compute_in(compute_dtype: str) -> None:
    """Few activations that meet quantised weights keep 31 bits in float32; in shorter dtypes 16, which is faster."""
    library.load().exact_activations = compute_dtype == "float32"


def together(rank: int, ranks: int) -> str:
    """Join the ranks of this machine, so that `Decoder` and `agree` work over them; "" when they are joined, otherwise
    why they are not, and MindSpore's collectives are to be used.

    Raises:
        UserError: the memory that the launcher made cannot be used.
    """
    file, why_not = cluster.shared_memory()
    if file is None:
        return why_not
    try:
        library.load().join_ranks(file, rank, ranks, cluster.wait_limit_s())
    except RuntimeError as error:
        raise UserError(str(error), "the ranks of this machine", f"Set {cluster.SUM}=mindspore.",
                        exit_code=EXIT_FAILED) from error
    return ""


def agree(ids: np.ndarray) -> np.ndarray:
    """Rank 0's `ids` (N,) int32 on every rank that is `together`.

    Raises:
        RuntimeError: see `lost_rank`.
    """
    return library.load().agree(ids)


def lost_rank() -> Optional[UserError]:
    """Why nothing works any more after a RuntimeError: a rank has not come; None when it was something else."""
    complaint = library.load().ranks_complaint
    return UserError(complaint, exit_code=EXIT_FAILED) if complaint else None


def _operator(name: str) -> ops.Custom:
    """The C function qwen15_<name> as a MindSpore operator with one float32 output."""
    function = f"qwen15_{name}"
    operator = ops.Custom(f"{library.load().path}:{function}", out_shape=None, out_dtype=ms.float32, func_type="aot")
    # Finds <function>InferShape, so that the output's shape follows the inputs' at run time.
    operator.add_prim_attr("reg_op_name", function)
    # The KV cache is written through an input: without this the graph may merge, move or drop the call.
    operator.add_prim_attr("side_effect_mem", True)
    return operator


def _eps(value: float) -> ms.Tensor:
    """RMSNorm's epsilon as an operator's input: MindSpore hands attributes only to C++ that includes its headers."""
    return ms.Tensor([value], ms.float32)


class Embed(nn.Cell):
    """Rows of the embedding: (T,) -> (T, E)."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.run = _operator("embed")

    def construct(self, ids, table):
        return self.run(ids, *table)


class Qkv(nn.Cell):
    """RMSNorm of x (T, E), q/k/v projections with bias, rotary embedding, and the write of k and v into the KV cache at
    `slots` (T,); gives q (T, H*D)."""

    def __init__(self, eps: float, num_heads: int, num_kv_heads: int, head_dim: int, compute_dtype: str):
        super().__init__(auto_prefix=False)
        self.run = _operator("qkv")
        self.eps = _eps(eps)

    def construct(self, x, norm, wq, bq, wk, bk, wv, bv, cos, sin, positions, slots, key_cache, value_cache):
        return self.run(x, norm, *wq, bq, *wk, bk, *wv, bv, cos, sin, positions, slots, key_cache, value_cache,
                        self.eps)


class Attention(nn.Cell):
    """softmax(q k^T / sqrt(D)) v over each token's own sequence, read from the paged cache: q (T, H*D) -> (T, H*D)."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__(auto_prefix=False)
        self.run = _operator("attention")

    def construct(self, q, key_cache, value_cache, query_lens, context_lens, block_tables):
        return self.run(q, key_cache, value_cache, query_lens, context_lens, block_tables)


class Project(nn.Cell):
    """x (T, I) times w (O, I) transposed: (T, O)."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.run = _operator("project")

    def construct(self, x, w):
        return self.run(x, *w)


class ProjectAdd(nn.Cell):
    """residual (T, O) + x (T, I) times w (O, I) transposed."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.run = _operator("project_add")

    def construct(self, x, w, residual):
        return self.run(x, *w, residual)


class GateUp(nn.Cell):
    """RMSNorm of x (T, E), then silu(x w1^T) * (x w3^T): (T, F)."""

    def __init__(self, eps: float):
        super().__init__(auto_prefix=False)
        self.run = _operator("gate_up")
        self.eps = _eps(eps)

    def construct(self, x, norm, w1, w3):
        return self.run(x, norm, *w1, *w3, self.eps)


class Head(nn.Cell):
    """Logits (B, V) of each sequence's last token: final RMSNorm, then the output projection."""

    def __init__(self, eps: float):
        super().__init__(auto_prefix=False)
        self.run = _operator("head")
        self.eps = _eps(eps)

    def construct(self, x, query_lens, norm, w):
        return self.run(x, query_lens, norm, *w, self.eps)


class Decoder(nn.Cell):
    """The whole stack as one operator: ids (T,) -> logits (B, V). Its plain twin is the composition in model.py.

    `construct` takes ids, positions, slots (T,), query_lens, context_lens (B,), block_tables (B, M), and `held`,
    everything that is the same at each call: cos and sin (P, D), the embedding (V, E), the final norm (E,), the head
    (V, E), and for every layer, one after another, attention_norm, wq, bq, wk, bk, wv, bv, wo, ffn_norm, w1, w3, w2,
    key_cache, value_cache; every tensor of a matrix in its place.

    Args:
        eps: RMSNorm's epsilon.
        binding: the operator keeps under it where all of `held` is, for `Decode`.
    """

    def __init__(self, eps: float, binding: "Binding"):
        super().__init__(auto_prefix=False)
        self.run = _operator("decoder")
        self.eps = _eps(eps)
        self.binding = binding.tensor()

    def construct(self, ids, positions, slots, query_lens, context_lens, block_tables, held):
        return self.run(ids, positions, slots, query_lens, context_lens, block_tables, self.eps, self.binding, *held)


class Decode(nn.Cell):
    """`Decoder` with one new token for each sequence, on what it was last given: the logits (B, V).

    MindSpore's preparation of a call costs some microseconds for each input, and `held` has 14 for every layer.
    `construct` takes rows (B, 3 + M) int32, each the token's id, context_len, slot and the block table, and the head
    (V, E).

    Args:
        binding: the Decoder's. Whoever calls makes sure that it `holds` what the network has now.
    """

    def __init__(self, binding: "Binding"):
        super().__init__(auto_prefix=False)
        self.run = _operator("decode")
        self.binding = binding.tensor()

    def construct(self, rows, head):
        return self.run(self.binding, rows, *head)


class Binding:
    """A number under which the kernels keep where one network's parameters and caches are in memory.

    They keep addresses and own nothing: `close` it before the parameters go.

    Args:
        ranks: more than one: the layers are a slice, and what `together` has joined is added up inside the operators.
        split_vocab: table and head are slices too.
    """

    def __init__(self, ranks: int, split_vocab: bool):
        self._library = library.load()
        self._number = self._library.open_binding(ranks > 1, split_vocab)
        self._parts = ranks if split_vocab else 1

    def tensor(self) -> ms.Tensor:
        """The number as an operator's input, as often as the logits have more columns than the head has rows."""
        return ms.Tensor([self._number] * self._parts, ms.int32)

    def addresses(self) -> List[int]:
        """Where the last Decoder call found all of its `held`; empty before the first."""
        return self._library.bound_addresses(self._number)

    def step(self, sequences: int, blocks: int, logits: np.ndarray) -> library.BoundStep:
        """`Decode` without MindSpore, for so many rows with block tables of so many; logits (B, V) float32.

        Its `run` raises a RuntimeError where no Decoder call has been made under this number, or a number in rows is
        out of its range.
        """
        return self._library.bound_step(self._number, sequences, blocks, logits)

    def close(self) -> None:
        """Forget them; Decode fails from then on."""
        self._library.close_binding(self._number)
