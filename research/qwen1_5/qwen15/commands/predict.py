"""The command line of run_qwen1_5.py: its flags, and what each run is: a conversation, or prompts to continue."""

from __future__ import annotations

import argparse
from typing import List, Optional, Sequence, Tuple

from .. import interrupts  # noqa: F401  (before everything that imports NumPy, see there)
from ..command_line import Parser, boolean, positive, program, whole
from ..config.describe import describe
from ..config.flags import add_flags
from ..config.load import config_of
from ..config.schema import Config
from ..errors import EXIT_OK, UserError
from ..generation.session import Session, Settings
from ..reporting import LEVELS, begin, set_encoding
from .options import PredictOptions


def parser() -> Parser:
    """Every flag of run_qwen1_5.py."""
    prog = program("predict", "run_qwen1_5.py")
    made = Parser(prog, "Continue texts, or chat, with Qwen1.5 on MindSpore: on the CPU, or on Ascend cards.", [
        f'{prog} --load_checkpoint models/Qwen1.5-0.5B-Chat --chat',
        f'{prog} --config predict_qwen1_5_7b.yaml --load_checkpoint models/7b --predict_data "Gravity is"',
        f'{prog} --load_checkpoint models/7b --predict_file prompts.jsonl --output_file results.jsonl',
        f'{prog} --config predict_qwen1_5_7b.yaml --print_config'])
    add_flags(made)
    group = made.add_argument_group("input")
    group.add_argument("--predict_data", nargs="+", default=[], metavar="TEXT", help="one or more texts to continue")
    group.add_argument("--predict_file", metavar="FILE",
                       help="prompts, one a line, or JSON lines with settings of their own; - reads standard input")
    group.add_argument("--chat", action="store_true", help="ask as a conversation; without texts, an interactive one")
    group.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    group.add_argument("--control_tokens", type=boolean, default=True, metavar="True|False",
                       help="whether <|im_start|> and the like in a text become control tokens (default True; never "
                            "with --chat)")
    group.add_argument("--stop", nargs="+", default=[], metavar="TEXT",
                       help="end an answer before any of these strings")
    group.add_argument("--n", type=whole, default=1, metavar="N",
                       help="answers to each prompt, sampled independently (with --do_sample)")
    group.add_argument("--logit_bias", nargs="+", default=[], metavar="ID=NUMBER",
                       help="add a number to a token's logit; -inf forbids the token")
    group.add_argument("--max_batch", type=positive, metavar="N",
                       help="most sequences that run at once (default: 16 with --predict_file, else what the KV cache "
                            "holds)")
    group.add_argument("--task", default="text_generation", choices=("text_generation",),
                       help="accepted as in the original, without effect")
    group.add_argument("--ray", nargs="?", const="auto", metavar="ADDRESS",
                       help="with --predict_file: let the workers of a Ray cluster do the work (default address: the "
                            "cluster of this machine)")
    group.add_argument("--ray_workers", type=positive, metavar="N",
                       help="models on the cluster (default: as many as fit)")
    group.add_argument("--ray_cpus", type=positive, metavar="N", help="CPUs, and threads, of each (default 2)")
    group = made.add_argument_group("output")
    group.add_argument("--output_format", choices=("text", "jsonl"),
                       help="text streams to stdout (default); jsonl prints one object per prompt (default with "
                            "--predict_file)")
    group.add_argument("--output_file", metavar="FILE",
                       help="JSON lines, written as results come; the same command again continues where it ended")
    group.add_argument("--echo", nargs="?", const=True, type=boolean, metavar="True|False",
                       help="whether the prompt is printed before its continuation (default True, False with --chat)")
    group.add_argument("--no-echo", dest="echo", action="store_const", const=False, help="the same as --echo False")
    group.add_argument("--prompt_logprobs", type=whole, metavar="N", help="in JSON: those of the prompt's tokens")
    group.add_argument("--logprobs", type=whole, default=0, metavar="N",
                       help="in JSON: log probabilities of the N likeliest tokens")
    group.add_argument("--dry_run", action="store_true",
                       help="check prompts, memory and checkpoint without loading, and stop")
    group.add_argument("--log_level", choices=LEVELS, help="what is said on stderr (default info)")
    group.add_argument("--debug", action="store_true", help="show tracebacks; log level debug")
    return made


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; returns the exit code.

    Raises:
        UserError: whatever the user can mend.
    """
    args = parser().parse_args(argv)
    level = args.log_level or ("debug" if args.debug else "info")
    config = config_of(args)
    if args.print_config:
        print(describe(config))
        return EXIT_OK
    options = PredictOptions.of(args)
    settings = _settings(config, args)
    report = begin(level, config.notes)
    set_encoding(json=not options.interactive and options.output_format == "jsonl")
    if options.interactive and not options.dry_run:
        from . import repl

        return repl.run(Session.prepare(config), settings, options.system, report)
    from . import batch

    return batch.run(config, settings, options, report)


def _settings(config: Config, args: argparse.Namespace) -> Settings:
    try:
        return Settings.of(config).changed({"stop": args.stop, "logprobs": args.logprobs, "n": args.n,
                                            "prompt_logprobs": args.prompt_logprobs,
                                            "logit_bias": _biases(args.logit_bias)})
    except ValueError as error:
        raise UserError(str(error), where="command line") from None


def _biases(texts: Sequence[str]) -> List[Tuple[int, float]]:
    made = []
    for text in texts:
        token, _, value = text.partition("=")
        try:
            made.append((int(token), float(value)))
        except ValueError:
            raise ValueError(f"logit_bias wants ID=NUMBER, not {text!r}") from None
    return made
