"""One decoder layer at a time over the sequences of a calibration text, by the network's own operators in float32."""

from __future__ import annotations

from typing import Any, List, Mapping

import numpy as np

from ..config.hf_config import HfConfig
from ..network.base import rope_tables

_BLOCK_TOKENS = 32


class Steps:
    """The steps of a layer between its matrices, each over one sequence of `length` tokens.

    Weights are float32 arrays under the names of the table in `naming`, without the layer: `attention.wq.weight`.

    Args:
        config: the model's sizes, epsilon and base of the rotary angles.
        length: tokens of every sequence.
    """

    def __init__(self, config: HfConfig, length: int):
        import mindspore as ms
        from mindspore import nn

        from .. import ops

        ms.set_device("CPU")
        ms.set_context(mode=ms.GRAPH_MODE, jit_config={"jit_level": "O0"})
        operators, self.note = ops.select()
        operators.compute_in("float32")
        dims, eps = config.dims, config.rms_norm_eps
        self._tensor, self._eps = ms.Tensor.from_numpy, eps
        blocks = -(-length // _BLOCK_TOKENS)
        angles = [ms.Tensor(table) for table in rope_tables(length, dims.head_dim, config.rope_theta)]
        numbers = np.arange(length, dtype=np.int32)
        places = ms.Tensor(numbers)
        lengths = ms.Tensor(np.array([length], np.int32))
        tables = ms.Tensor(np.arange(blocks, dtype=np.int32)[None])
        cache = (blocks, _BLOCK_TOKENS, dims.num_kv_heads, dims.head_dim)

        class Attend(nn.Cell):
            """x (T, E) -> (T, H*D), what the output projection is multiplied with."""

            def __init__(self) -> None:
                super().__init__(auto_prefix=False)
                self.qkv = operators.Qkv(eps, dims.num_heads, dims.num_kv_heads, dims.head_dim, "float32")
                self.attention = operators.Attention(dims.num_heads, dims.num_kv_heads, dims.head_dim)
                self.keys = ms.Parameter(ms.Tensor(np.zeros(cache, np.float32)), "keys", False)
                self.values = ms.Parameter(ms.Tensor(np.zeros(cache, np.float32)), "values", False)

            def construct(self, x: Any, norm: Any, wq: Any, bq: Any, wk: Any, bk: Any, wv: Any, bv: Any) -> Any:
                q = self.qkv(x, norm, (wq,), bq, (wk,), bk, (wv,), bv, angles[0], angles[1], places, places, self.keys,
                             self.values)
                return self.attention(q, self.keys, self.values, lengths, lengths, tables)

        class Gate(nn.Cell):
            """x (T, E) -> (T, F), what the down projection is multiplied with."""

            def __init__(self) -> None:
                super().__init__(auto_prefix=False)
                self.gate_up = operators.GateUp(eps)

            def construct(self, x: Any, norm: Any, w1: Any, w3: Any) -> Any:
                return self.gate_up(x, norm, (w1,), (w3,))

        class Add(nn.Cell):
            """residual + y w^T."""

            def __init__(self) -> None:
                super().__init__(auto_prefix=False)
                self.project_add = operators.ProjectAdd()

            def construct(self, y: Any, w: Any, residual: Any) -> Any:
                return self.project_add(y, (w,), residual)

        self._attend, self._gate, self._add = Attend(), Gate(), Add()

    def normed(self, x: np.ndarray, norm: np.ndarray) -> np.ndarray:
        """RMSNorm of x (T, E): what the query, key and value, or the gate and up projections are multiplied with."""
        wide = x.astype(np.float64)
        wide /= np.sqrt(np.mean(wide * wide, axis=1, keepdims=True) + self._eps)
        return wide.astype(np.float32) * norm

    def attend(self, sequences: List[np.ndarray], w: Mapping[str, np.ndarray]) -> List[np.ndarray]:
        """Of each sequence (T, E) what its output projection is multiplied with, (T, H*D)."""
        names = ("attention_norm.weight", *(f"attention.{kind}.{part}" for kind in ("wq", "wk", "wv")
                                            for part in ("weight", "bias")))
        return self._each(self._attend, sequences, [w[name] for name in names])

    def gate(self, sequences: List[np.ndarray], w: Mapping[str, np.ndarray]) -> List[np.ndarray]:
        """Of each sequence (T, E) what its down projection is multiplied with, (T, F)."""
        names = ("ffn_norm.weight", "feed_forward.w1.weight", "feed_forward.w3.weight")
        return self._each(self._gate, sequences, [w[name] for name in names])

    def add(self, y: List[np.ndarray], weight: np.ndarray, x: List[np.ndarray]) -> List[np.ndarray]:
        """x + y w^T of each sequence: x (T, E), y (T, I), weight (E, I), float32."""
        held = self._tensor(weight)
        return [self._add(self._tensor(one), held, self._tensor(residual)).asnumpy() for one, residual in zip(y, x)]

    def _each(self, cell: Any, sequences: List[np.ndarray], weights: List[np.ndarray]) -> List[np.ndarray]:
        held = [self._tensor(weight) for weight in weights]
        return [cell(self._tensor(sequence), *held).asnumpy() for sequence in sequences]
