"""Decoding steps that do not pass the parameters and caches to MindSpore again."""

import itertools
import weakref
from types import ModuleType
from typing import Any, Iterator, List, Optional, Tuple

import numpy as np

_TURNS = 8
"""Steps in which every parameter's address is looked at once."""
_HEAD = 4
"""Where the output projection is among `LlamaForCausalLM.held`."""


def _tell_of_other_memory(parameter: Any, listener: "weakref.WeakMethod") -> None:
    """Have `listener` called before `parameter.assign_value`, in which MindSpore gives a parameter other memory."""
    owner, assign = weakref.ref(parameter), type(parameter).assign_value

    def assign_value(value: Any) -> Any:
        tell = listener()
        if tell is not None:
            tell()
        return assign(owner(), value)

    parameter.assign_value = assign_value


class ShortDecode:
    """Decoding steps that do not pass the parameters and caches again: the kernels have kept where the last whole call found them.

    MindSpore's preparation of those hundreds of inputs took longer than everything else around the kernels. One sequence, whose
    steps are the shortest, has a graph of its own with fixed shapes: for others MindSpore infers them at every call.

    A parameter may be given other memory, and then the next call has to be a whole one. MindSpore's ways to do that (`set_data`,
    `load_param_into_net`) end in the parameter's `assign_value`, which tells. To look at all of them took 0.2 ms a token, for after
    a step none is in the CPU's cache, so only some are looked at each time: what another way has moved is noticed _TURNS steps
    later at most. Until then the old values are used, and they are there: views keep their memory.

    Args:
        operators: the operator set, one with `Decode`.
        cell: the network (`model.LlamaForCausalLM`).
        blocks: most blocks of a sequence.
    """

    def __init__(self, operators: ModuleType, cell: Any, blocks: int):
        import mindspore as ms
        from mindspore.nn import cell as cells

        self._ms = ms
        self._operators, self._network = operators, cell
        # What a call of a cell compiled as this one ends in; on the way there is as much again.
        self._execute = cells._cell_graph_executor._graph_executor
        self._address_of = ms.Tensor._data_ptr  # what Tensor.data_ptr calls
        self._forget()
        forget = weakref.WeakMethod(self._forget)
        for parameter in cell.held:
            _tell_of_other_memory(parameter, forget)
        self._cells: List[Any] = []
        weakref.finalize(self, cell.binding.close)
        self._row = np.full((1, 3 + blocks), -1, np.int32)
        self._one = self._compile(ms.Tensor(self._row))
        self._many: Optional[str] = None

    @staticmethod
    def is_possible() -> bool:
        """Whether this MindSpore has what is used here beside its public names; without it every step is a whole call."""
        import mindspore as ms
        from mindspore.nn import cell as cells

        executor = getattr(cells, "_cell_graph_executor", None)
        return hasattr(executor, "_graph_executor") and hasattr(ms.Tensor, "_data_ptr") and hasattr(ms.nn.Cell, "phase_cache")

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

    def _forget(self) -> None:
        """The next call has to be a whole one."""
        self._addresses: List[int] = []
        self._views: List[np.ndarray] = []
        self._parts: Iterator[Tuple[List[int], List[Any]]] = itertools.cycle([([0], [])])  # unequal: never current

    def note_whole_call(self) -> None:
        """The whole network has just run and passed everything."""
        addresses, held = self._network.binding.addresses(), list(self._network.held)
        if addresses == self._addresses:
            return
        self._forget()
        views = [parameter.asnumpy() for parameter in held]
        if addresses == [view.__array_interface__["data"][0] for view in views] == [self._address_of(p) for p in held]:
            self._addresses, self._views = addresses, views
            # The head is in every part: MindSpore passes it, and the kernels insist on the one they know.
            self._parts = itertools.cycle([(addresses[i::_TURNS] + addresses[_HEAD:_HEAD + 1], held[i::_TURNS] + [held[_HEAD]])
                                           for i in range(_TURNS)])

    def is_current(self) -> bool:
        """Whether the parameters and caches are where the kernels know them, as far as told or seen."""
        known, parameters = next(self._parts)
        current = known == list(map(self._address_of, parameters))
        if not current:
            self._forget()
        return current

    def run(self, input_ids: np.ndarray, context_lens: np.ndarray, block_tables: np.ndarray,
            slot_mapping: np.ndarray) -> np.ndarray:
        """`Network.decode`; only when `is_current`."""
        count, blocks = block_tables.shape
        if count == 1 and 3 + blocks <= self._row.shape[1]:
            graph, rows = self._one, self._row
        else:
            if self._many is None:
                self._many = self._compile(self._ms.Tensor(shape=[None, None], dtype=self._ms.int32))
            graph, rows = self._many, np.empty((count, 3 + blocks), np.int32)
        rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3:3 + blocks] = input_ids, context_lens, slot_mapping, block_tables
        return self._execute((self._ms.Tensor.from_numpy(rows),), graph).asnumpy()
