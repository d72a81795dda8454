"""What a token costs beside the kernels: Python, MindSpore's call of the graph, choosing the token, streaming it."""

from __future__ import annotations

import argparse
import os
from typing import Any, Dict, FrozenSet, List, Mapping, Sequence

from ..command_line import Parser
from ..generation.request import Step
from ..generation.sampling import SamplingParams
from ..generation.session import Answer, Prompt, Settings
from ..network.cpu import CpuNetwork
from . import options, report, rounds
from .engines import Engines
from .ours import Decode, random_prompts
from .report import Column, Measured, number, text

WHOLE_CALLS = "greedy, all parameters passed at each step"
"""The step as MindSpore would call it: `network/short_decode.py` is worth its difference from plain greedy."""
WAYS: Dict[str, SamplingParams] = {
    "greedy": SamplingParams(),
    WHOLE_CALLS: SamplingParams(),
    "top_k 50": SamplingParams(do_sample=True, top_k=50),
    "top_k 20, top_p 0.8": SamplingParams(do_sample=True, temperature=0.7, top_k=20, top_p=0.8),
    "the same, repetition_penalty 1.1": SamplingParams(do_sample=True, temperature=0.7, top_k=20, top_p=0.8,
                                                       repetition_penalty=1.1),
    "top_p 0.8": SamplingParams(do_sample=True, temperature=0.7, top_p=0.8),
}
"""How tokens are chosen. With random weights no token is likely, and top_p alone keeps most of the vocabulary."""


class MadeUpTokens:
    """Text for token ids, where the checkpoint has no tokenizer."""

    control_token_ids: FrozenSet[int] = frozenset()

    @staticmethod
    def token_bytes(token: int) -> bytes:
        """Some text of a usual length."""
        return f" {token:x}".encode()


class Stream:
    """Takes each step's token to its text and the text to a file, as a run in a terminal does."""

    def __init__(self, prompt: Sequence[int], limit: int):
        settings = Settings(False, 1.0, 0, 1.0, 1.0, None, limit, None)
        self._answer = Answer(MadeUpTokens, Prompt(tuple(prompt), settings, frozenset()))
        self._out = open(os.devnull, "w", encoding="utf-8")

    def take(self, step: Step) -> None:
        """One step."""
        self._out.write(self._answer.take(step))
        self._out.flush()

    def close(self) -> None:
        """Close the file."""
        self._out.close()


def parser() -> Parser:
    """The flags."""
    made = Parser("qwen15 bench overhead", __doc__ or "", ["qwen15 bench overhead"])
    options.add_lengths(made, 128, answer="tokens in a run")
    options.add_checkpoint(made)
    options.add_run(made, "overhead", against=())
    return made


def run(args: argparse.Namespace) -> Measured:
    """Measure every way of choosing a token.

    Raises:
        UserError: arguments that cannot be.
    """
    engines = Engines(args, args.context + args.new_tokens, 1)
    checkpoint, ours = engines.checkpoint, engines.ours
    prompts = random_prompts(1, args.context, ours.vocab_size)
    rows: List[Dict[str, Any]] = []
    network = ours.engine.network
    assert isinstance(network, CpuNetwork)  # the bench runs on this network only
    short = network.short
    for way, params in WAYS.items():
        network.short = None if way == WHOLE_CALLS else short
        stream = Stream(prompts[0].tolist(), args.context + args.new_tokens)
        decode = Decode(ours, prompts, args.new_tokens, params, stream.take)
        mine = rounds.interleave({"qwen15": decode.run}, args.rounds, lambda: {})["qwen15"]
        stream.close()
        own_s = [sample.own_seconds for sample in mine]
        rows.append({"way": way, "token_ms": rounds.median_seconds(mine) * 1e3,
                     "own_ms": rounds.median_own_seconds(mine) * 1e3,
                     "samples": {"seconds": [sample.seconds for sample in mine], "own_seconds": own_s}})
    facts = {"model": checkpoint.label, "dtype": checkpoint.dtype, "vocabulary": ours.vocab_size, **engines.facts}
    return Measured(facts, COLUMNS, rows, _bars(checkpoint, rows))


COLUMNS = (Column("tokens are chosen by", text("way")), Column("a token, ms", number("token_ms", ".2f")),
           Column("of it not kernels, ms", number("own_ms", ".3f")))


def _bars(checkpoint: options.BenchCheckpoint, rows: Sequence[Mapping[str, Any]]) -> report.Bars:
    labels = [row["way"].replace(", ", ",\n") for row in rows]
    return report.Bars(f"A token beside the kernels, {checkpoint.label}", "milliseconds", labels,
                       {"Python, MindSpore, sampling, streaming": [row["own_ms"] for row in rows]})
