"""The command-line flags that set a configuration key: the parser is built from one table."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, Callable, List, Optional

from ..command_line import boolean, number, whole
from .keys import MODEL, TOKENIZER

_NO_EFFECT = "accepted, no effect in prediction"


@dataclass(frozen=True)
class Flag:
    """A command-line flag that was given: the key it sets, its own name and its value."""

    key: str
    name: str
    value: Any


def _device_id(text: str) -> Optional[int]:
    # The original's default -1 means "the launcher decides", which is what an absent flag means here.
    return None if text.strip() == "-1" else whole(text)


@dataclass(frozen=True)
class FlagField:
    """One command-line flag that sets one key."""

    name: str
    key: str
    type: Callable[[str], Any]
    help: str


FLAG_FIELDS = (
    FlagField("--run_mode", "run_mode", str, "predict, the only mode of this module"),
    FlagField("--load_checkpoint", "load_checkpoint", str,
              "checkpoint: a file, a folder, a folder with rank_0, rank_1, ..., or a hub name: OWNER/NAME[@REVISION]"),
    FlagField("--hub", "hub", str, "where a hub name is looked up: hf (Hugging Face, or HF_ENDPOINT) or modelscope"),
    FlagField("--auto_trans_ckpt", "auto_trans_ckpt", boolean,
              "let every rank cut its own slice of a whole checkpoint"),
    FlagField("--use_parallel", "use_parallel", boolean, "spread the model over model_parallel workers"),
    FlagField("--vocab_file", TOKENIZER + "vocab_file", str, "the tokenizer's vocab.json"),
    FlagField("--merges_file", TOKENIZER + "merges_file", str, "the tokenizer's merges.txt"),
    FlagField("--seq_length", MODEL + "seq_length", whole, "longest sequence, prompt included (tokens)"),
    FlagField("--predict_length", MODEL + "max_decode_length", whole,
              "stop at this TOTAL length, prompt included (tokens)"),
    FlagField("--max_new_tokens", MODEL + "max_new_tokens", whole, "stop after this many new tokens"),
    FlagField("--use_past", MODEL + "use_past", boolean, "keep keys and values of past tokens (KV cache)"),
    FlagField("--do_sample", MODEL + "do_sample", boolean, "draw tokens at random; False takes the likeliest"),
    FlagField("--temperature", MODEL + "temperature", number, "divides the logits before sampling"),
    FlagField("--top_k", MODEL + "top_k", whole, "sample among the k likeliest tokens, 0 for all"),
    FlagField("--top_p", MODEL + "top_p", number,
              "sample among the likeliest tokens of this total probability, 1.0 for all"),
    FlagField("--min_p", MODEL + "min_p", number,
              "sample among tokens with at least this part of the likeliest one's probability, 0 for all"),
    FlagField("--repetition_penalty", MODEL + "repetition_penalty", number,
              "divides the logits of tokens in prompt and answer, 1.0 is none"),
    FlagField("--presence_penalty", MODEL + "presence_penalty", number,
              "taken from the logits of tokens in the answer, -2 to 2, 0 is none"),
    FlagField("--frequency_penalty", MODEL + "frequency_penalty", number,
              "the same for each time a token is in the answer"),
    FlagField("--no_repeat_ngram_size", MODEL + "no_repeat_ngram_size", whole,
              "no N tokens in a row come twice, 0 allows it"),
    FlagField("--min_new_tokens", MODEL + "min_new_tokens", whole, "an answer does not end before this many tokens"),
    FlagField("--seed", "seed", whole, "makes sampling repeatable"),
    FlagField("--speculate", "speculate", str,
              "guess tokens and check several in one step: ngram (from the text itself), or folder or hub name of a "
              "small model with the same tokenizer; none for neither"),
    FlagField("--speculate_tokens", "speculate_tokens", whole, "most guesses in one step"),
    FlagField("--batch_size", MODEL + "batch_size", whole, "sequences that run together"),
    FlagField("--device_target", "context.device_target", str, "auto, Ascend or CPU"),
    FlagField("--device_id", "context.device_id", _device_id, "Ascend card; -1 lets the launcher choose"),
    FlagField("--threads", "context.runtime_num_threads", whole, "CPU threads"),
    FlagField("--train_dataset", "train_dataset.data_loader.dataset_dir", str, _NO_EFFECT),
    FlagField("--eval_dataset", "eval_dataset.data_loader.dataset_dir", str, _NO_EFFECT),
    FlagField("--optimizer_parallel", "parallel.enable_parallel_optimizer", boolean, _NO_EFFECT),
    FlagField("--remote_save_url", "remote_save_url", str, _NO_EFFECT),
)
"""The flags of the original run_qwen1_5.py that set a key, and ours. A flag that is not given sets nothing."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add --config, every flag of `FLAG_FIELDS`, --options and --print_config to `parser`."""
    group = parser.add_argument_group("configuration",
                                      "each of these overrides the YAML; one that is not given leaves it alone")
    group.add_argument("--config", metavar="YAML", help="predict_qwen1_5_*.yaml")
    for field in FLAG_FIELDS:
        group.add_argument(field.name, type=field.type, default=argparse.SUPPRESS, help=field.help,
                           metavar="True|False" if field.type is boolean else field.name[2:].upper())
    group.add_argument("--options", action="extend", nargs="+", default=[], metavar="KEY=VALUE",
                       help="any key of the YAML by its dotted name: model.model_config.num_blocks=256")
    group.add_argument("--print_config", action="store_true", help="show every value and where it came from, and stop")


def flags_from(namespace: argparse.Namespace) -> List[Flag]:
    """The flags of `FLAG_FIELDS` that were given."""
    given = ((field, getattr(namespace, field.name[2:], None)) for field in FLAG_FIELDS)
    return [Flag(field.key, field.name, value) for field, value in given if value is not None]
