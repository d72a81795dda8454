"""Our network in MindSpore's graph mode on the CPU, behind the seam."""

from __future__ import annotations

from typing import Callable, Optional

import numpy as np

from .. import interrupts
from ..config.schema import Config
from .base import Network, rope_tables
from .short_decode import ShortDecode


class CpuNetwork(Network):
    """Our network (model.py) in MindSpore's graph mode on the CPU."""

    def __init__(self, config: Config, checkpoint: str, tell: Callable[[str], None]):
        import mindspore as ms

        from .. import cluster, ops
        from . import weights
        from .model import Args, LlamaForCausalLM

        self._ms = ms
        self._lost_rank: Callable[[], Optional[Exception]] = lambda: None
        ms.set_device("CPU")
        ms.set_context(mode=ms.GRAPH_MODE, jit_config={"jit_level": "O0"})
        operators, note = ops.select()
        model = config.model
        self.ranks = config.parallel.model_parallel  # 1 unless use_parallel
        apart = ""
        if self.ranks > 1:
            self.rank, _ = cluster.join()
            apart = operators.together(self.rank, self.ranks)
        self.vocab_size = model.dims.vocab_size
        split_vocab = self.ranks > 1 and not config.parallel.vocab_emb_dp and self.vocab_size % self.ranks == 0
        operators.compute_in(model.compute_dtype)
        self._weights = weights.Loader.of(config, checkpoint, self.rank, operators.weight_dtype)
        cos, sin = rope_tables(model.seq_length, model.dims.head_dim, model.theta)
        args = Args(self._weights, operators, model.dims, model.rms_norm_eps, model.num_blocks, model.block_size,
                    model.compute_dtype, self.ranks, self.rank, split_vocab, self.ranks > 1 and not apart)
        self._cell = LlamaForCausalLM(args, (ms.Tensor(cos), ms.Tensor(sin)))
        tell(self._weights.account())
        dynamic = {1: ms.Tensor(shape=[None], dtype=ms.int32), 2: ms.Tensor(shape=[None, None], dtype=ms.int32)}
        self._cell.set_inputs(*(dynamic[rank] for rank in (1, 1, 1, 1, 1, 2)))
        self._cell.set_train(False)
        # The name under which MindSpore runs a compiled graph at once: under any other, every call first looks
        # through all cells for changes, which took longer than everything else around the kernels.
        self._cell.phase = "prefill"
        # Compile now, so that the first prompt's time is its own.
        self._cell.compile(*(ms.Tensor(np.zeros((1,) * rank, np.int32)) for rank in (1, 1, 1, 1, 1, 2)))
        self.short = ShortDecode(operators, self._cell) if self._cell.fused else None
        self.note = f"CPU, {note}, weights {self._weights.describe()}, KV cache {model.compute_dtype}"
        if self._weights.schemes:
            vocabulary, layers = self._weights.nbytes()
            self.quantised_bytes = layers + (vocabulary if model.dims.tie_word_embeddings else vocabulary // 2)
        if self.ranks > 1:
            self._agree = self._broadcast if apart else operators.agree
            self._lost_rank = self._lost_rank if apart else operators.lost_rank
            how = f"by MindSpore's collectives ({apart})" if apart else "in shared memory"
            self.note += f", ranks add {how}"
            self._rank_0 = ms.ops.Broadcast(0)

    def prefill(self, input_ids, query_lens, context_lens, block_tables, slot_mapping):
        starts = np.repeat(context_lens - np.cumsum(query_lens, dtype=np.int32), query_lens)
        positions = np.arange(len(input_ids), dtype=np.int32) + starts
        return self._run(input_ids, positions, slot_mapping, query_lens, context_lens, block_tables)

    def decode(self, input_ids, context_lens, block_tables, slot_mapping):
        if self.short is not None and self.short.ready:
            interrupts.put_back()
            return self._explained(self.short.run, input_ids, context_lens, block_tables, slot_mapping)
        ones = np.ones_like(context_lens)
        with interrupts.held():
            return self._run(input_ids, context_lens - 1, slot_mapping, ones, context_lens, block_tables)

    def _run(self, *arrays: np.ndarray) -> np.ndarray:
        tensors = [self._ms.Tensor.from_numpy(np.ascontiguousarray(array, dtype=np.int32)) for array in arrays]
        logits = self._explained(lambda: self._cell(*tensors).asnumpy())
        if self.short is not None:
            self.short.note_whole_call()
        return logits

    def largest(self, logits):
        last = None if self.short is None else self.short.last
        return None if last is None or last[0] is not logits else last[1]

    def agree(self, ids):
        if self.ranks == 1:
            return ids
        return self._explained(self._agree, ids)

    def _explained(self, function: Callable[..., np.ndarray], *arguments: np.ndarray) -> np.ndarray:
        """What the function returns. A rank that has not come is named, instead of the operator in which the others
        waited."""
        try:
            return function(*arguments)
        except RuntimeError as error:
            lost = self._lost_rank()
            if lost is None:
                raise
            raise lost from error

    def _broadcast(self, ids: np.ndarray) -> np.ndarray:
        return self._rank_0((self._ms.Tensor(ids),))[0].asnumpy()

    def likeness(self):
        return self._weights.likeness()

    def find_non_finite(self):
        return self._weights.find_non_finite()
