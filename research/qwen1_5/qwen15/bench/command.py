"""The bench's command line: one sub-command, and one file, per thing that can be measured."""

from __future__ import annotations

import argparse
import importlib
from typing import Dict, Optional, Sequence, Tuple

COMMANDS: Dict[str, Tuple[str, str]] = {
    "decode": ("decode", "tokens per second, one at a time, at any batch and context"),
    "prefill": ("prefill", "tokens per second of prompts"),
    "kernels": ("kernels", "each kernel by itself, without MindSpore"),
    "overhead": ("overhead", "what a token costs beside the kernels: Python, MindSpore, sampling, streaming"),
    "load": ("load", "seconds from imported to ready, and peak memory"),
    "tokenize": ("tokenize", "megabytes per second of text to tokens"),
    "convert": ("convert", "megabytes per second of checkpoints"),
    "parallel": ("parallel", "decode over several workers of one machine"),
    "numerics": ("numerics", "how close logits are to transformers', for each dtype"),
    "make-checkpoint": ("make_checkpoint", "write a random checkpoint of any Qwen1.5 size"),
}
"""Name -> (module with `main(argv) -> int`, what it measures)."""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Parse and run; returns the exit code. Raises UserError for what the user can mend."""
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="qwen15 bench", description="Measure, and compare with others.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="what can be measured:\n" + "\n".join(f"  {name:<{width}}  {what}" for name,
                                                     (_, what) in COMMANDS.items()))
    parser.add_argument("what", metavar="WHAT", choices=COMMANDS, help="one of those below; WHAT --help says more")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    module, _ = COMMANDS[args.what]
    return importlib.import_module(f".{module}", __package__).main(args.rest)
