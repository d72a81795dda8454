"""The seam between machines: one interface, our network on a CPU and MindFormers' LlamaForCausalLM on Ascend."""

import itertools
import weakref
from types import ModuleType
from typing import Any, Callable, Iterator, List, Optional, Tuple

import numpy as np

from .config import Config


class Network:
    """What the engine drives.

    Attributes:
        vocab_size: V, columns of the logits.
        rank, ranks: this process among the tensor-parallel ones.
        supports_cached_prefill: `prefill` may continue sequences that are partly in the KV cache (context_lens > query_lens).
        note: one line on what runs where.
    """

    vocab_size: int
    rank: int = 0
    ranks: int = 1
    supports_cached_prefill: bool = True
    note: str = ""

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
        """`prefill` with one new token for each sequence: input_ids, context_lens and slot_mapping are (B,)."""
        raise NotImplementedError

    def agree(self, ids: np.ndarray) -> np.ndarray:
        """Rank 0's `ids` (N,) int32 on every rank; the other ranks pass an array of the same size."""
        return ids

    def find_non_finite(self) -> Optional[str]:
        """Name of the first weight with NaN or infinity, None when all are finite. Reads every weight."""
        return None


def rope_tables(length: int, head_dim: int, theta: float) -> Tuple[np.ndarray, np.ndarray]:
    """cos and sin (length, head_dim) float32 of the angles position * theta^(-2i/head_dim), i repeated over both halves.

    Rounded to float32 where Hugging Face's Qwen2 rounds (exponent, power, reciprocal, angle): at position 30 000 one unit in the
    last place of a frequency is 2e-3 of a turn's radian.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    power = np.power(theta, exponent.astype(np.float64)).astype(np.float32)
    inverse = np.float32(1.0) / power
    angles = np.arange(length, dtype=np.float32)[:, None] * inverse[None, :]
    angles = np.concatenate((angles, angles), axis=1)
    return np.cos(angles), np.sin(angles)


class CpuNetwork(Network):
    """Our network (model.py) in MindSpore's graph mode on the CPU."""

    def __init__(self, config: Config, checkpoint: str, tell: Callable[[str], None]):
        import mindspore as ms

        from . import cluster, ops, weights
        from .model import LlamaForCausalLM

        self._ms = ms
        ms.set_device("CPU")
        ms.set_context(mode=ms.GRAPH_MODE, jit_config={"jit_level": "O0"})
        operators, note = ops.select()
        model = config.model
        self.ranks = config.parallel.model_parallel  # 1 unless use_parallel
        if self.ranks > 1:
            self.rank, _ = cluster.join()
        self.vocab_size = model.dims.vocab_size
        split_vocab = self.ranks > 1 and not config.parallel.vocab_emb_dp and self.vocab_size % self.ranks == 0
        held_dtype = operators.weight_dtype(model.param_init_type)
        self._source = weights.Source(checkpoint, model, held_dtype, self.rank, self.ranks, config.parallel.vocab_emb_dp,
                                      whole=config.auto_trans_ckpt or self.ranks == 1)
        cos, sin = rope_tables(model.seq_length, model.dims.head_dim, model.theta)
        self._cell = LlamaForCausalLM(
            self._source, operators, model.dims, model.rms_norm_eps, (ms.Tensor(cos), ms.Tensor(sin)),
            (model.num_blocks, model.block_size), model.compute_dtype, self.ranks, self.rank, split_vocab)
        tell(self._source.account())
        dynamic = {1: ms.Tensor(shape=[None], dtype=ms.int32), 2: ms.Tensor(shape=[None, None], dtype=ms.int32)}
        self._cell.set_inputs(*(dynamic[rank] for rank in (1, 1, 1, 1, 1, 2)))
        self._cell.set_train(False)
        # The name under which MindSpore runs a compiled graph at once: under any other, every call first looks through all cells
        # for changes, which took longer than everything else around the kernels.
        self._cell.phase = "prefill"
        # Compile now, so that the first prompt's time is its own.
        self._cell.compile(*(ms.Tensor(np.zeros((1,) * rank, np.int32)) for rank in (1, 1, 1, 1, 1, 2)))
        blocks = -(-model.seq_length // model.block_size)
        self._short = _ShortDecode(operators, self._cell, blocks) if self._cell.fused and _ShortDecode.is_possible() else None
        self.note = f"CPU, {note}, weights {held_dtype}, KV cache {model.compute_dtype}"
        if self.ranks > 1:
            self._broadcast = ms.ops.Broadcast(0)

    def prefill(self, input_ids, query_lens, context_lens, block_tables, slot_mapping):
        starts = np.repeat(context_lens - np.cumsum(query_lens, dtype=np.int32), query_lens)
        positions = np.arange(len(input_ids), dtype=np.int32) + starts
        return self._run(input_ids, positions, slot_mapping, query_lens, context_lens, block_tables)

    def decode(self, input_ids, context_lens, block_tables, slot_mapping):
        if self._short is not None and self._short.is_current():
            return self._short.run(input_ids, context_lens, block_tables, slot_mapping)
        ones = np.ones_like(context_lens)
        return self._run(input_ids, context_lens - 1, slot_mapping, ones, context_lens, block_tables)

    def _run(self, *arrays: np.ndarray) -> np.ndarray:
        tensors = [self._ms.Tensor.from_numpy(np.ascontiguousarray(array, dtype=np.int32)) for array in arrays]
        logits = self._cell(*tensors).asnumpy()
        if self._short is not None:
            self._short.note_whole_call()
        return logits

    def agree(self, ids):
        if self.ranks == 1:
            return ids
        return self._broadcast((self._ms.Tensor(ids),))[0].asnumpy()

    def find_non_finite(self):
        return self._source.find_non_finite()


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


class _ShortDecode:
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


def build_network(config: Config, checkpoint: str, tell: Callable[[str], None]) -> Network:
    """The network for `config.device_target`, its weights loaded from `checkpoint`.

    Args:
        config: the whole configuration.
        checkpoint: file or folder, as `weights.resolve` found it.
        tell: receives one line for each thing worth knowing (the account of the weights, casts).

    Raises:
        UserError: the checkpoint does not fit, or the device cannot be used.
    """
    if config.device_target == "Ascend":
        from .mindformers_network import MindFormersNetwork

        return MindFormersNetwork(config, checkpoint, tell)
    return CpuNetwork(config, checkpoint, tell)
