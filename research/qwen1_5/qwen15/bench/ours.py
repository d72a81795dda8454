"""Our engine on a checkpoint: prefill and decode as a user's run does them, with their times."""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Callable, Sequence

import numpy as np

from .. import (
    interrupts,  # noqa: F401  (before NumPy, see there)
    ops,
)
from ..generation import session  # noqa: F401  (interrupts before NumPy, see there)
from ..generation.engine import Engine
from ..generation.request import Limits, Request, Step
from ..generation.sampling import SamplingParams
from ..kernels import library
from ..network import weights  # noqa: F401  (interrupts before NumPy, see there)
from ..network.build import build_network
from ..reporting import quiet_frameworks
from .options import BenchCheckpoint
from .rounds import Timing


class Ours:
    """An engine with room for `sequences` sequences of `longest` tokens.

    Attributes:
        vocab_size: token ids are below it.
        quantised_bytes: what a step reads of the weights, None where they are not quantised.
    """

    def __init__(self, checkpoint: BenchCheckpoint, threads: int, longest: int, sequences: int):
        quiet_frameworks("info")
        ops.use_threads(threads)
        block_size = 32
        blocks = -(-(longest + 1) // block_size)  # a token more, see Decode
        config = checkpoint.config(seq_length=blocks * block_size, block_size=block_size, num_blocks=blocks * sequences,
                                   max_decode_length=blocks * block_size)
        model = config.model
        self.dims = model.dims
        self.vocab_size = model.dims.vocab_size
        network = build_network(config, weights.resolve(config.load_checkpoint),
                                lambda line: print(line, file=sys.stderr))
        self.quantised_bytes = network.quantised_bytes
        self.engine = Engine(network, Limits(self.vocab_size, model.seq_length, model.num_blocks, block_size),
                             None, session.selection())
        self._library = library.load()

    def prefill(self, prompt: Sequence[int]) -> Timing:
        """Seconds from a prompt to its first token."""
        self.engine.pool.forget_all()  # the same prompt again would be found there
        request = Request(tuple(prompt), len(prompt) + 1)
        busy_s, start_s = self._library.busy_seconds, time.perf_counter()
        steps = list(self.engine.generate([request]))
        spent_s = time.perf_counter() - start_s
        assert len(steps) == 1
        return Timing(spent_s, spent_s - (self._library.busy_seconds - busy_s))

    def decode(self, prompts: np.ndarray, new_tokens: int) -> Decode:
        """Greedy decoding, see `Decode`."""
        return Decode(self, prompts, new_tokens)


class Decode:
    """Decoding of prompts whose full blocks stay in the cache from run to run.

    Args:
        ours: the engine.
        prompts: (B, N) token ids.
        new_tokens: tokens of each sequence in one run; all but the first are timed. The step that ends the prompts
            decodes as well, so a token more is made and not timed.
        params: how they are chosen.
        take: receives each step.
    """

    def __init__(self, ours: Ours, prompts: np.ndarray, new_tokens: int, params: SamplingParams = SamplingParams(),
                 take: Callable[[Step], None] = lambda step: None):
        self._ours, self._take = ours, take
        self._requests = [Request(tuple(prompt.tolist()), len(prompt) + new_tokens + 1, params=params)
                          for prompt in prompts]
        self._in_cache = False

    def run(self) -> Timing:
        """Seconds per step of all sequences, whole: Python, MindSpore, the kernels, and choosing the tokens."""
        engine = self._ours.engine
        if not self._in_cache:  # one by one: prompts added together would start decoding at different steps
            for request in self._requests:
                list(engine.generate([dataclasses.replace(request, max_length=len(request.prompt) + 1)]))
            self._in_cache = True
        waiting = {engine.add(request) for request in self._requests}
        while waiting:
            waiting -= {step.request for step in engine.step()}
        busy_s, start_s = self._ours._library.busy_seconds, time.perf_counter()
        count, running = 0, True
        while running:
            for step in engine.step():
                self._take(step)
                running = running and step.finish_reason is None
            count += 1
        spent_s = time.perf_counter() - start_s
        busy_s = self._ours._library.busy_seconds - busy_s
        while engine.has_work:  # more sequences than one piece of prefill takes end one step apart
            engine.step()
        return Timing(spent_s / count, (spent_s - busy_s) / count)


def random_prompts(count: int, tokens: int, vocab_size: int) -> np.ndarray:
    """(count, tokens) token ids, the same at every call."""
    return np.random.default_rng(tokens).integers(0, vocab_size, (count, tokens))
