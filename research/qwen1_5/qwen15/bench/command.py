"""The bench's command line: one sub-command, and one file, per thing that can be measured."""

from __future__ import annotations

import argparse
import importlib
from typing import Any, Dict, Optional, Sequence, Tuple

from ..command_line import Parser

COMMANDS: Dict[str, Tuple[str, str]] = {
    "decode": ("decode", "tokens per second, one at a time, at any batch and context"),
    "prefill": ("prefill", "tokens per second of prompts"),
    "scaling": ("scaling", "decode and prefill on 1, 2, 4, ... threads"),
    "neighbour": ("neighbour", "decode beside a neighbour that keeps one core busy"),
    "kernels": ("kernels", "each kernel by itself, without MindSpore"),
    "overhead": ("overhead", "what a token costs beside the kernels: Python, MindSpore, sampling, streaming"),
    "load": ("load", "seconds from imported to ready, and peak memory"),
    "tokenize": ("tokenize", "megabytes per second of text to tokens"),
    "convert": ("convert", "megabytes per second of checkpoints"),
    "parallel": ("parallel", "decode over several workers of one machine"),
    "speculate": ("speculate", "guessed tokens against plain decoding: prompt lookup, a draft model"),
    "serve": ("serve", "many clients against a batch, the first token beside a long prompt, a shared beginning"),
    "numerics": ("numerics", "how close logits are to transformers', for each dtype"),
    "make-checkpoint": ("make_checkpoint", "write a random checkpoint of any Qwen1.5 size"),
}
"""Name -> (module, what it measures). A module has `parser()`, and `run(args)`, which gives what is to be shown, a
`report.Measured`, or None where it has printed that itself."""


def parser() -> Parser:
    """The name of a measurement, and the rest."""
    width = max(map(len, COMMANDS))
    made = Parser("qwen15 bench", "Measure, and compare with others.",
                  [f"qwen15 bench {name:<{width}}  # {what}" for name, (_, what) in COMMANDS.items()],
                  usage="WHAT [flags]; qwen15 bench WHAT --help lists the flags")
    made.add_argument("what", metavar="WHAT", choices=list(COMMANDS), help="what to measure, see the examples")
    made.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return made


def module(what: str) -> Any:
    """The module of a measurement."""
    return importlib.import_module(f".{COMMANDS[what][0]}", __package__)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Parse, measure and show; returns the exit code.

    Raises:
        UserError: what the user can mend: arguments, no place for the plot (said before anything is measured), or what
            the measurement raises.
    """
    asked = parser().parse_args(argv)
    measurement = module(asked.what)
    args = measurement.parser().parse_args(asked.rest)
    from . import options, report  # NumPy comes with them

    plot = options.plot_path(args, asked.what)
    found = measurement.run(args)
    if found is not None:
        report.show(asked.what, asked.rest, found, plot)
    return 0
