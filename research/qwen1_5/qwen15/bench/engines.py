"""The engines of a measurement: ours on the weights asked for and, with --against, another that takes turns with it."""

from __future__ import annotations

import argparse
import functools
from typing import Any, Callable, Dict, List, Optional, Union

from . import hf, options, rounds
from .hf import HuggingFace
from .ours import Ours
from .probes import Probes

Engine = Union[Ours, HuggingFace]


class Engines:
    """All that a measurement runs, with room for `sequences` sequences of `longest` tokens, on the same threads.

    Args:
        args: what `options.add_checkpoint` and `options.add_run` have read.

    Attributes:
        checkpoint: the weights.
        machine: what they run on.
        ours: our engine.
        note: who it is compared with, None for nobody or ourselves.

    Raises:
        UserError: arguments that cannot be, or something is not installed.
    """

    def __init__(self, args: argparse.Namespace, longest: int, sequences: int):
        against = getattr(args, "against", None)
        if against == "hf":
            hf.check_installed()
        plain = options.find_bfloat16(args) if against == "bfloat16" else None
        self.checkpoint = options.find_checkpoint(args)
        self.machine = Probes(args.threads)
        self.ours = Ours(self.checkpoint, self.machine.threads, longest, sequences)
        self.note: Optional[str] = None
        self._rounds = args.rounds
        self._all: Dict[str, Engine] = {"qwen15": self.ours}
        if against == "hf":
            theirs = HuggingFace(self.checkpoint, self.machine.threads)
            self._all["hf"], self.note = theirs, theirs.note
        if plain is not None:
            self._all["bfloat16"] = Ours(plain, self.machine.threads, longest, sequences)

    @property
    def facts(self) -> Dict[str, Any]:
        """What a table's heading says of weights and machine."""
        return self.machine.facts(self.checkpoint.label, self.checkpoint.dtype, self._rounds)

    def take_turns(self, prepare: Callable[[Engine], Callable[[], rounds.Timing]]) -> Dict[str, List[rounds.Sample]]:
        """Samples of every engine's runs, each between probes of the machine; `prepare` makes an engine's run."""
        return rounds.interleave({name: prepare(engine) for name, engine in self._all.items()}, self._rounds,
                                 functools.partial(self.machine.limits, self.checkpoint.computes_in))
