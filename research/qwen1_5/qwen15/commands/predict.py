"""What run_qwen1_5.py does: configuration, prompts, checkpoint, engine, and the answer on stdout."""

import argparse
import sys
import time
from typing import List, Optional, Sequence, Union

from .. import interrupts  # noqa: F401  (before everything that imports NumPy, see there)
from ..config.describe import describe
from ..config.flags import add_flags, boolean, flags_from
from ..config.load import load_config
from ..config.schema import Config
from ..errors import UserError
from ..generation.request import Usage
from ..generation.session import Prompt, Session, Settings, mismatch, numbered
from ..reporting import LEVELS, Reporter, quiet_frameworks, set_encoding
from .results import JsonLines, Text, summary


def parser() -> argparse.ArgumentParser:
    """Every flag of run_qwen1_5.py."""
    made = argparse.ArgumentParser(
        prog="run_qwen1_5.py", description="Continue texts, or chat, with Qwen1.5 on MindSpore: on the CPU, or on Ascend cards.",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="exit codes: 0 fine, 1 failed, 2 usage or bad input, 130 interrupted")
    add_flags(made)
    group = made.add_argument_group("input")
    group.add_argument("--predict_data", nargs="+", default=[], metavar="TEXT", help="one or more texts to continue")
    group.add_argument("--predict_file", metavar="FILE",
                       help="prompts, one a line, or JSON lines with settings of their own; - reads standard input")
    group.add_argument("--chat", action="store_true", help="ask as a conversation; without texts, an interactive one")
    group.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    group.add_argument("--control_tokens", type=boolean, default=True, metavar="True|False",
                       help="whether <|im_start|> and the like in a text become control tokens (default True; never with --chat)")
    group.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="end an answer before any of these strings")
    group.add_argument("--max_batch", type=int, metavar="N",
                       help="most sequences that run at once (default: 16 with --predict_file, else what the KV cache holds)")
    group.add_argument("--task", default="text_generation", choices=("text_generation",), help="accepted for the original's sake")
    group = made.add_argument_group("output")
    group.add_argument("--output_format", choices=("text", "jsonl"),
                       help="text streams to stdout (default); jsonl prints one object per prompt (default with --predict_file)")
    group.add_argument("--output_file", metavar="FILE",
                       help="JSON lines, written as results come; the same command again continues where it ended")
    group.add_argument("--echo", nargs="?", const=True, type=boolean, metavar="True|False",
                       help="whether the prompt is printed before its continuation (default True, False with --chat)")
    group.add_argument("--no-echo", dest="echo", action="store_const", const=False, help="the same as --echo False")
    group.add_argument("--logprobs", type=int, default=0, metavar="N", help="in JSON: log probabilities of the N likeliest tokens")
    group.add_argument("--dry_run", action="store_true", help="check prompts, memory and checkpoint without loading, and stop")
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
    report = Reporter(level)
    config = _load_config(args)
    if args.print_config:
        print(describe(config))
        return 0
    interactive = args.chat and not args.predict_data and not args.predict_file
    _check_flags(args, interactive)
    for note in config.notes:
        report.warning(note)
    settings = _settings(config, args)
    quiet_frameworks(level)
    set_encoding(json=not interactive and _format(args) == "jsonl")
    if interactive and not args.dry_run:
        from . import repl

        return repl.run(Session.prepare(config), settings, args.system, report)
    if args.predict_file or args.output_file:
        from . import batch

        return batch.run(config, settings, args, report)
    session = Session.prepare(config, launched=not args.dry_run)
    texts = _repeat(args.predict_data, config)
    prompts = make_prompts(session, texts, settings, args)
    _point_out(session, args, prompts, report)
    if args.dry_run:
        from . import dry_run

        print(dry_run.describe(session, prompts))
        return 0
    session.requests(prompts)  # refused before anything is loaded
    session.open(report.info, args.max_batch)
    return _answer(session, prompts, texts, args, report)


def _load_config(args: argparse.Namespace) -> Config:
    flags = flags_from(args)
    if not args.config and not any(flag.key == "load_checkpoint" for flag in flags):
        raise UserError("no configuration is given", where="--config",
                        fix="Pass one of the predict_qwen1_5_*.yaml beside this script, or --load_checkpoint with a config.json in it.")
    return load_config(args.config, flags, args.options)


def _format(args: argparse.Namespace) -> str:
    return args.output_format or ("jsonl" if args.predict_file or args.output_file else "text")


def _check_flags(args: argparse.Namespace, interactive: bool) -> None:
    """Refuse flags that contradict each other or would have no effect."""
    if args.predict_data and args.predict_file:
        raise UserError("both --predict_data and --predict_file are given", where="command line", fix="Keep one of them.")
    if not interactive and not args.predict_data and not args.predict_file and not args.dry_run:
        raise UserError("no text is given", where="--predict_data",
                        fix='Pass --predict_data "your text", --predict_file FILE, or --chat.')
    if args.system is not None and not args.chat:
        raise UserError("a system message needs a conversation", where="--system", fix="Add --chat.")
    if interactive:
        for flag, given in (("--output_format", args.output_format == "jsonl"), ("--output_file", args.output_file),
                            ("--logprobs", args.logprobs), ("--echo", args.echo is not None), ("--max_batch", args.max_batch)):
            if given:
                raise UserError("has no effect in an interactive conversation", where=flag, fix="Pass the message with --predict_data.")
    elif _format(args) == "text":
        if args.output_file:
            raise UserError("an output file holds JSON lines", where="--output_format", fix="Leave --output_format text away.")
        if args.logprobs:
            raise UserError("log probabilities need JSON", where="--logprobs", fix="Add --output_format jsonl.")
    elif args.echo is not None:
        raise UserError("has no effect on JSON: the prompt is a field of its own", where="--echo", fix="Leave it away.")
    if args.max_batch is not None and args.max_batch < 1:
        raise UserError(f"must be at least 1, not {args.max_batch}", where="--max_batch")


def _settings(config: Config, args: argparse.Namespace) -> Settings:
    try:
        return Settings.of(config).changed({"stop": args.stop, "logprobs": args.logprobs})
    except ValueError as error:
        raise UserError(str(error), where="command line") from None


def _repeat(texts: Sequence[str], config: Config) -> List[str]:
    """The original's --batch_size: a single prompt is run that many times side by side."""
    return list(texts) * config.model.batch_size if len(texts) == 1 else list(texts)


def make_prompts(session: Session, texts: Sequence[str], settings: Settings, args: argparse.Namespace) -> List[Prompt]:
    """The texts as they stand, or with --chat as the message of a conversation each."""
    made = []
    for number, text in enumerate(texts, 1):
        label = "the prompt" if len(texts) == 1 else f"prompt {number}"
        if args.chat:
            if not text.strip():
                raise UserError(f"{label} is empty", where="--predict_data", fix="Write a message.")
            made.append(session.chat_prompt(messages(text, args.system), settings, label))
        else:
            made.append(session.prompt(text, settings, args.control_tokens, label))
    return numbered(made)


def messages(text: str, system: Optional[str]) -> List[dict]:
    """A conversation of one question."""
    return [*([{"role": "system", "content": system}] if system is not None else []), {"role": "user", "content": text}]


def _point_out(session: Session, args: argparse.Namespace, prompts: Sequence[Prompt], report: Reporter) -> None:
    hint = mismatch(session.tokenizer, args.chat, prompts)
    if hint:
        report.warning(hint)
    for name in sorted({name for prompt in prompts for name in prompt.settings.idle}):
        if session.config.sources.get(f"model.model_config.{name}", "").startswith("--"):
            report.warning(f"note: --{name} has no effect without --do_sample True")


def _answer(session: Session, prompts: Sequence[Prompt], texts: Sequence[str], args: argparse.Namespace, report: Reporter) -> int:
    """Generate, print on rank 0, and return the exit code."""
    out = sys.stdout if session.rank == 0 else None
    if _format(args) == "jsonl":
        writer: Union[JsonLines, Text] = JsonLines(out, texts)
    else:
        echo = not args.chat if args.echo is None else args.echo
        writer = Text(out, texts if echo else [""] * len(texts))
    start_s = time.perf_counter()
    usages: List[Usage] = []
    try:
        for piece in session.run(prompts):
            writer.take(piece)
            if piece.usage is not None:
                usages.append(piece.usage)
    finally:
        writer.close()
    report.info(summary(usages, time.perf_counter() - start_s))
    return 0
