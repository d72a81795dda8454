"""Arguments that measurements share: which checkpoint, how many threads and rounds, against whom, the plot."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Mapping, NamedTuple, Optional, Sequence

from .. import family
from ..command_line import positive, whole_from
from ..config.flags import Flag
from ..config.keys import MODEL
from ..config.load import load_config
from ..config.schema import Config
from ..errors import UserError
from ..machine import cache_folder
from . import report
from .make_checkpoint import DTYPES, QUANTISED, dims_of, make_checkpoint
from .make_checkpoint import size as family_size

AGAINST = {"hf": "also run transformers on the same, taking turns", "bfloat16": "also the same shape in bfloat16"}
"""Whom our engine can be measured against, and what that does."""


class BenchCheckpoint(NamedTuple):
    """Weights to measure with.

    Attributes:
        path: a Hugging Face folder (or, if given by the user, a converted checkpoint).
        label: its name in tables.
        dtype: of the matrices, and of the KV cache where it is none of `QUANTISED`.
    """

    path: str
    label: str
    dtype: str

    @property
    def computes_in(self) -> str:
        """dtype of the KV cache, and of what is not quantised."""
        return "bfloat16" if self.dtype in QUANTISED else self.dtype

    def config(self, others: Optional[Mapping[str, object]] = None, **values: object) -> Config:
        """The configuration of a run on it; `values` are keys of model.model_config, `others` whole ones."""
        whole_keys = {"context.device_target": "CPU", MODEL + "param_init_type": self.computes_in,
                      MODEL + "compute_dtype": self.computes_in, **(others or {}),
                      **{MODEL + key: value for key, value in values.items()}}
        return load_config(None, [Flag("load_checkpoint", "checkpoint", self.path),
                                  *(Flag(key, "bench", value) for key, value in whole_keys.items())])


at_least_two = whole_from(2, why=": the first token comes out of the prompt")
"""argparse type of tokens of which the first is not timed."""


def add_lengths(parser: argparse.ArgumentParser, new_tokens: int, prompt: str = "tokens of the prompt",
                answer: str = "tokens of each sequence in a run") -> None:
    """Add how many tokens are there when decoding begins, and how many are decoded; `new_tokens` if nothing is said."""
    parser.add_argument("--context", type=positive, default=32, metavar="N", help=f"{prompt} (default 32)")
    parser.add_argument("--new_tokens", type=at_least_two, default=new_tokens, metavar="N",
                        help=f"{answer} (default {new_tokens})")


def add_checkpoint(parser: argparse.ArgumentParser, size: str = "0.5b", layers: Optional[int] = None) -> None:
    """Add what decides the weights; `size` and `layers` are the random checkpoint's if nothing else is said."""
    group = parser.add_argument_group("weights")
    group.add_argument("--checkpoint", metavar="FOLDER",
                       help="measure with this checkpoint; without it a random one is made and kept")
    group.add_argument("--size", type=family_size, default=size,
                       help=f"of the random checkpoint: one of {', '.join(family.FAMILY)} (default {size})")
    group.add_argument("--layers", type=positive, metavar="N", default=layers,
                       help=f"of the random checkpoint (default {layers or 'the published number'})")
    group.add_argument("--dtype", choices=(*DTYPES, *QUANTISED),
                       help="of weights and KV cache (default: the checkpoint's own; bfloat16 for a random one)")
    group.add_argument("--cache", metavar="FOLDER", default=cache_folder("bench"),
                       help="where random checkpoints are kept (default %(default)s)")


def add_run(parser: argparse.ArgumentParser, what: str, rounds: int = 5, threads: bool = True,
            against: Sequence[str] = ("hf",)) -> None:
    """Add what decides how it is measured and shown."""
    group = parser.add_argument_group("run")
    if threads:
        group.add_argument("--threads", type=positive, metavar="N",
                           help="threads of everyone compared (default: this machine's cores)")
    add_rounds(group, rounds)
    if against:
        group.add_argument("--against", choices=against, help="; ".join(f"{name}: {AGAINST[name]}" for name in against))
    group.add_argument("--plot", metavar="FILE",
                       help=f"PNG to write (default qwen15_bench_{what}.png, if matplotlib is installed)")
    group.add_argument("--no_plot", action="store_true", help="write none")


def add_rounds(parser: argparse._ActionsContainer, rounds: int = 5) -> None:
    """Add how often everything is run; so often if nothing is said."""
    parser.add_argument("--rounds", type=positive, default=rounds, metavar="N",
                        help=f"runs of each, medians are shown (default {rounds})")


def find_checkpoint(args: argparse.Namespace) -> BenchCheckpoint:
    """The checkpoint the arguments mean; a random one is made when it is not there yet.

    Raises:
        UserError: no such folder, --layers beside --checkpoint, or no room.
    """
    if args.checkpoint is not None:
        if args.layers is not None:
            raise UserError("is for random checkpoints, and --checkpoint names one", where="--layers",
                            fix="Leave one of them out.")
        if not os.path.isdir(args.checkpoint):
            raise UserError("no such folder", where=f"--checkpoint {args.checkpoint}")
        own = load_config(None, [Flag("load_checkpoint", "--checkpoint", args.checkpoint),
                                 Flag("context.device_target", "bench", "CPU")])
        return BenchCheckpoint(args.checkpoint, os.path.basename(os.path.normpath(args.checkpoint)), args.dtype
                          or own.model.param_init_type)
    return random_checkpoint(args.size, args.layers, args.dtype or "bfloat16", args.cache)


def random_checkpoint(size: str, layers: Optional[int], dtype: str, cache: str) -> BenchCheckpoint:
    """A checkpoint of random weights in the folder `cache`, made when it is not there yet.

    Raises:
        UserError: no room.
    """
    label = f"Qwen1.5-{size.upper()}" + (f", {layers} layers" if layers else "")
    name = f"qwen1.5-{size.lower()}-" + (f"{layers}layers-" if layers else "") + dtype
    path = os.path.join(cache, name)
    if not os.path.isdir(path):
        print(f"making random weights in {path}", file=sys.stderr)
        os.makedirs(cache, exist_ok=True)
        make_checkpoint(path, dims_of(size, layers), dtype)
    return BenchCheckpoint(path, f"{label}, random weights", dtype)


def find_bfloat16(args: argparse.Namespace) -> BenchCheckpoint:
    """The random checkpoint of the same shape in bfloat16, for `--against bfloat16`.

    Raises:
        UserError: the weights to measure are in bfloat16 themselves, or the user's own, whose shape may be any.
    """
    if args.checkpoint is not None or args.dtype in (None, "bfloat16"):
        raise UserError("compares random weights of another dtype with bfloat16", where="--against bfloat16",
                        fix="Give --dtype, and leave --checkpoint out.")
    return random_checkpoint(args.size, args.layers, "bfloat16", args.cache)


def plot_path(args: argparse.Namespace, what: str) -> Optional[str]:
    """Where the plot goes, None for none, or from a measurement without; asked before anything is measured.

    Raises:
        UserError: --plot without matplotlib, or a file there that this command did not write.
    """
    return None if getattr(args, "no_plot", True) else report.plot_target(args.plot, f"qwen15_bench_{what}.png")
