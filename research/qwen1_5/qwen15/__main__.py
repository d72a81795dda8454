"""All commands under one name: `python -m qwen15 COMMAND ...`, or `qwen15 COMMAND ...` once installed."""

from __future__ import annotations

import importlib
import sys
from typing import Optional, Sequence

from .errors import UserError, did_you_mean, run_main

COMMANDS = {
    "predict": ("qwen15.commands.predict", "continue texts (run_qwen1_5.py)"),
    "convert": ("convert_weight", "Hugging Face checkpoint -> MindSpore (convert_weight.py)"),
    "convert-reversed": ("convert_reversed", "MindSpore checkpoint -> Hugging Face (convert_reversed.py)"),
    "transform": ("transform_ckpt", "split and merge checkpoints (transform_ckpt.py)"),
    "launch": ("qwen15.launch.plan", "start the workers of a multi-card run (msrun_launcher.sh)"),
    "make-yaml": ("qwen15.commands.make_yaml", "a predict YAML from a checkpoint's config.json"),
    "memory": ("qwen15.commands.memory", "bytes per card, before anything is loaded"),
    "doctor": ("qwen15.commands.doctor", "what this machine has and what will be used"),
    "ascend-check": ("qwen15.ascend.check", "compare the Ascend path with plain definitions on a card, and report"),
    "bench": ("qwen15.bench", "measure speed, memory and closeness to transformers"),
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one of `COMMANDS` with the rest of the arguments."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: qwen15 COMMAND ...\n\n" + "\n".join(f"  {name:<{width}}  {what}" for name,
                                                          (_, what) in COMMANDS.items()))
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise UserError(f"{name!r} is not a command", fix=did_you_mean(name, COMMANDS)
                        or f"Known are {', '.join(COMMANDS)}.")
    return importlib.import_module(COMMANDS[name][0]).main(rest)


def run() -> int:
    """Entry point of the `qwen15` script: exit codes as everywhere."""
    return run_main(main)


if __name__ == "__main__":
    sys.exit(run())
