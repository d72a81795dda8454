"""Every command of `qwen15`: its module, what it does, its parser."""

from __future__ import annotations

import importlib
from typing import Dict, Iterator, NamedTuple, Tuple

from .command_line import Parser


class Verb(NamedTuple):
    """A command: the module with its `main(argv)` and, unless it takes positions only, `parser()`; what it does."""

    module: str
    what: str


GROUPS: Dict[str, Dict[str, Verb]] = {
    "generate": {
        "predict": Verb("qwen15.commands.predict", "continue texts, or chat (run_qwen1_5.py)"),
        "serve": Verb("qwen15.serve.command", "an OpenAI-compatible server"),
        "launch": Verb("qwen15.launch.plan", "start the workers of a multi-card run (msrun_launcher.sh)"),
    },
    "checkpoints": {
        "convert": Verb("convert_weight", "Hugging Face checkpoint -> MindSpore (convert_weight.py)"),
        "convert-reversed": Verb("convert_reversed", "MindSpore checkpoint -> Hugging Face (convert_reversed.py)"),
        "transform": Verb("transform_ckpt", "split and merge checkpoints (transform_ckpt.py)"),
    },
    "set up": {
        "make-yaml": Verb("qwen15.commands.make_yaml", "a predict YAML from a checkpoint's config.json"),
        "memory": Verb("qwen15.commands.memory", "bytes per card, before anything is loaded"),
        "doctor": Verb("qwen15.commands.doctor", "what this machine has and what will be used"),
        "completion": Verb("qwen15.completion", "a script that completes commands, flags and values in your shell"),
    },
    "examine": {
        "perplexity": Verb("qwen15.commands.perplexity", "how well a model predicts a text: what a quantisation costs"),
        "bench": Verb("qwen15.bench.command", "measure speed, memory and closeness to transformers"),
        "ascend-check": Verb("qwen15.ascend.check", "compare the Ascend path with plain definitions on a card"),
    },
}
VERBS: Dict[str, Verb] = {name: verb for group in GROUPS.values() for name, verb in group.items()}


def parsers() -> Iterator[Tuple[str, Parser]]:
    """(`bench decode`, its parser) of every command that takes flags; what the launcher takes are positions."""
    for name, verb in VERBS.items():
        module = importlib.import_module(verb.module)
        if hasattr(module, "parser"):
            yield name, module.parser()
        for part in getattr(module, "COMMANDS", ()):
            yield f"{name} {part}", module.module(part).parser()
