"""Decoding steps that do not pass the parameters and caches to MindSpore again."""

from __future__ import annotations

import weakref
from types import ModuleType
from typing import Any, List, Optional

import numpy as np


class ShortDecode:
    """Decoding steps that do not pass the parameters and caches again: the kernels know where the last whole call
    found them.

    MindSpore's preparation of those hundreds of inputs takes longer than everything else around the kernels. One
    sequence, whose steps are the shortest, has a graph of its own with fixed shapes: for others MindSpore infers them
    at every call.

    A parameter that is given other memory is seen at the next whole call, the next prompt. Until then steps use the
    memory that the kernels know, which is still there: the views kept here hold it.

    Args:
        operators: the operator set, one with `Decode`.
        cell: the network (`model.LlamaForCausalLM`).
        blocks: most blocks of a sequence.

    Attributes:
        ready: steps may be short: a whole call has run, and the kernels know all parameters where they are.
    """

    def __init__(self, operators: ModuleType, cell: Any, blocks: int):
        import mindspore as ms
        from mindspore.nn import cell as cells

        self._ms = ms
        self._operators, self._network = operators, cell
        # What calling a compiled cell ends in; getting there costs as much again.
        self._execute = cells._cell_graph_executor._graph_executor
        self._addresses: List[int] = []
        self._views: List[np.ndarray] = []
        self.ready = False
        self._cells: List[Any] = []
        weakref.finalize(self, cell.binding.close)
        self._row = np.full((1, 3 + blocks), -1, np.int32)
        self._one = self._compile(ms.Tensor(self._row))
        self._many: Optional[str] = None

    @staticmethod
    def is_possible() -> bool:
        """Whether this MindSpore has what is used here beside its public names; without it steps are whole calls."""
        import mindspore as ms
        from mindspore.nn import cell as cells

        executor = getattr(cells, "_cell_graph_executor", None)
        return hasattr(executor, "_graph_executor") and hasattr(ms.nn.Cell, "phase_cache")

    def _compile(self, rows: Any) -> str:
        """The compiled graph for such rows, as `_execute` knows it."""
        from .model import Decode

        cell = Decode(self._operators, self._network)
        cell.set_inputs(rows)
        cell.set_train(False)
        cell.phase = "increment"
        cell.compile(self._ms.Tensor(np.full((2, 4) if -1 in rows.shape else rows.shape, -1, np.int32)))
        self._cells.append(cell)
        return cell.phase_cache[cell.phase]

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
        """`Network.decode`; only when `ready`."""
        count, blocks = block_tables.shape
        if count == 1 and 3 + blocks <= self._row.shape[1]:
            graph, rows = self._one, self._row
        else:
            if self._many is None:
                self._many = self._compile(self._ms.Tensor(shape=[None, None], dtype=self._ms.int32))
            graph, rows = self._many, np.empty((count, 3 + blocks), np.int32)
        rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3:3 + blocks] = input_ids, context_lens, slot_mapping, block_tables
        return self._execute((self._ms.Tensor.from_numpy(rows),), graph).asnumpy()
