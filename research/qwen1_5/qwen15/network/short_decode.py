"""Decoding steps that do not go through MindSpore: the kernels know where the last whole call found everything."""

from __future__ import annotations

import weakref
from types import ModuleType
from typing import Any, List, Optional, Tuple

import numpy as np


class ShortDecode:
    """Decoding steps that do not pass the parameters and caches again: the kernels know where the last whole call
    found them.

    MindSpore's preparation of those hundreds of inputs takes longer than everything else around the kernels, and what
    is left of a call without them, with the copy of the logits, is still the greater part of it: `run` calls the
    kernels at once. `run_in_graph` is its plain twin, the same step as an operator of a MindSpore graph.

    A parameter that is given other memory is seen at the next whole call, the next prompt. Until then steps use the
    memory that the kernels know, which is still there: the views kept here hold it.

    Args:
        operators: the operator set, one with `Decode`.
        cell: the network (`model.LlamaForCausalLM`).

    Attributes:
        ready: steps may be short: a whole call has run, and the kernels know all parameters where they are.
        last: the logits of the last `run`, and `Network.largest` of them: found while the head's columns were in the
            caches, where a search of its own would fetch all logits from memory again.
    """

    def __init__(self, operators: ModuleType, cell: Any):
        self._operators, self._network = operators, cell
        self._addresses: List[int] = []
        self._views: List[np.ndarray] = []
        self._logits = np.empty((0, cell.vocab_size), np.float32)
        self._step: Any = None
        self.ready = False
        self.last: Optional[Tuple[np.ndarray, np.ndarray]] = None
        self._graph: Any = None
        weakref.finalize(self, cell.binding.close)

    def note_whole_call(self) -> None:
        """The whole network has just run and passed everything."""
        addresses = self._network.binding.addresses()
        if addresses != self._addresses:
            self._addresses = addresses
            self._views = [parameter.asnumpy() for parameter in self._network.held]
            # Where MindSpore passes copies instead, the next call may pass different ones.
            self.ready = addresses == [view.__array_interface__["data"][0] for view in self._views]

    def run(self, input_ids: np.ndarray, context_lens: np.ndarray, block_tables: np.ndarray,
            slot_mapping: np.ndarray) -> np.ndarray:
        """`Network.decode`; only when `ready`. The logits (B, V) float32 are valid until the next step: their memory is
        kept, since fresh pages for those of 32 sequences cost milliseconds, and asking where memory is costs tens of
        microseconds."""
        count, blocks = block_tables.shape
        step = self._step
        if step is None or step.rows.shape != (count, 3 + blocks):
            if count > len(self._logits):
                self._logits = np.empty((count, self._network.vocab_size), np.float32)
            step = self._step = self._network.binding.step(count, blocks, self._logits[:count])
        _fill(step.rows, input_ids, context_lens, block_tables, slot_mapping)
        step.run()
        self.last = step.logits, step.largest
        return step.logits

    def run_in_graph(self, input_ids: np.ndarray, context_lens: np.ndarray, block_tables: np.ndarray,
                     slot_mapping: np.ndarray) -> np.ndarray:
        """`run` by a MindSpore graph, which is compiled at the first call."""
        import mindspore as ms

        from .model import Decode

        if self._graph is None:
            self._graph = Decode(self._operators, self._network)
            self._graph.set_inputs(ms.Tensor(shape=[None, None], dtype=ms.int32))
            self._graph.set_train(False)
        rows = np.empty((len(input_ids), 3 + block_tables.shape[1]), np.int32)
        _fill(rows, input_ids, context_lens, block_tables, slot_mapping)
        return self._graph(ms.Tensor(rows)).asnumpy()


def _fill(rows: np.ndarray, input_ids: np.ndarray, context_lens: np.ndarray, block_tables: np.ndarray,
          slot_mapping: np.ndarray) -> None:
    """rows (B, 3 + M) int32, as the kernels take a step: each sequence's token, length, slot and blocks."""
    rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3:] = input_ids, context_lens, slot_mapping, block_tables
