"""What the three converters' command lines share: their flags, and the account they give on stderr."""

import argparse
import os
import sys
from typing import Any, Optional

from .. import terminal
from ..errors import UserError
from ..hub.names import HUBS


def add_common_flags(parser: argparse.ArgumentParser, dtype: bool = True) -> None:
    """Flags that every converter has."""
    if dtype:
        parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto",
                            help="of the result; auto keeps every tensor's own (default)")
        parser.add_argument("--allow_overflow", action="store_true",
                            help="let values that the new dtype cannot hold become inf")
        parser.add_argument("--max_shard_size", default="4GB", metavar="SIZE",
                            help="most bytes of one file of a folder: 4GB (default), 500MB, 2GiB")
    parser.add_argument("--dry_run", action="store_true", help="print what would be done, and write nothing")
    parser.add_argument("--verify", action="store_true",
                        help="read the result back and compare every tensor before it is put in place")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def add_hub_flag(parser: argparse.ArgumentParser) -> None:
    """For what reads Hugging Face folders, which may be given by their name on a hub."""
    parser.add_argument("--hub", choices=HUBS, default="hf",
                        help="where a name OWNER/NAME[@REVISION] is looked up: hf (Hugging Face, or HF_ENDPOINT; "
                             "default) or modelscope")


def require_source(flag: str, given: str, default: str, holds: str) -> None:
    """Tell that a flag is not given, where its default has nothing to convert.

    Args:
        flag: the source's.
        given: its value.
        default: what that is when the flag is not given.
        holds: the file or folder that has to be there then.

    Raises:
        UserError: the flag is not given, and nothing is there.
    """
    if given == default and not os.path.exists(holds):
        raise UserError(f"is not given, and {holds} is not there", flag, "Give the model that is to be converted.")


def options_from(args: argparse.Namespace, target: str, parts: Optional[int] = None, vocab_emb_dp: bool = True,
                 chosen: Any = None) -> Any:
    """The `hugging_face.Output` that the flags say.

    Args:
        args: the flags.
        target: the file or folder to make.
        parts: the number of ranks to slice for, None for no slices.
        vocab_emb_dp: whether every rank holds the embedding whole.
        chosen: the integers that a calibration chooses, a `quantise.Chosen`; None rounds to nearest.

    Raises:
        UserError: a flag's value is none, or flags do not go together.
    """
    from .hugging_face import Output, parse_size
    from .slices import Slicing

    return Output(target=target, form=args.format, dtype=args.dtype, shard_bytes=parse_size(args.max_shard_size),
                  slicing=None if parts is None else Slicing(parts, vocab_emb_dp), recipe=_recipe(args, chosen),
                  dequantise=getattr(args, "dequantize", False))


def _recipe(args: argparse.Namespace, chosen: Any) -> Any:
    """The `quantise.Recipe` that the flags say, None where nothing is quantised on the way."""
    from .quantise import DEFAULT_GROUPS, Recipe

    kind = getattr(args, "quantize", None)
    if kind is None:
        for flag in ("group_size", "keep_head"):
            if getattr(args, flag, None):
                raise UserError("has no effect without --quantize", f"--{flag}",
                                "Give --quantize int8 or int4 as well.")
        return None
    bits = {"int8": 8, "int4": 4}[kind]
    return Recipe(bits, args.group_size or DEFAULT_GROUPS[bits], args.keep_head, chosen)


def carry_out(plan: Any, args: argparse.Namespace, chosen: Any = None) -> bool:
    """Run a plan, or print it with `--dry_run`; tells on stderr what was done. Returns whether there is a result.

    `chosen` (`quantise.Chosen`) is let go at the end.
    """
    from ..checkpoint.atomic import partial_path
    from ..checkpoint.leftovers import account
    from ..progress import human_bytes
    from .run import check_plan, kept_bytes, run

    done = False
    try:
        for note in plan.notes:
            _tell(f"note: {note}")
        for phrase in account(plan.left_out):
            _tell(f"left out: {phrase}")
        check_plan(plan, args.overwrite)
        if args.dry_run:
            for line in plan.describe():
                print(line)
            return False
        try:
            result = run(plan, verify=args.verify, overwrite=args.overwrite,
                         allow_overflow=getattr(args, "allow_overflow", False))
            done = True
        except BaseException:
            if chosen is not None and chosen.kept():
                _tell(f"{chosen.kept()}: the same command goes on from there")
            if kept_bytes(plan):
                _tell(f"{human_bytes(kept_bytes(plan))} are kept in {partial_path(plan.target)}: "
                      "the same command goes on from there")
            raise
    finally:
        if chosen is not None:
            chosen.close(done)
        plan.close()
    for line in result.tally.lines():
        _tell(f"cast {line}")
    for name, (nan, infinite) in sorted(result.tally.non_finite.items()):
        _tell(f"warning: {name} holds {nan} NaN and {infinite} infinite values; they were carried over")
    if result.resumed_bytes:
        _tell(f"{human_bytes(result.resumed_bytes)} of {human_bytes(plan.read_bytes)} were done by an interrupted run, "
              f"{result.resumed} of {len(plan.files)} files whole")
    written = plan.write_bytes * (1 - result.resumed_bytes / max(plan.read_bytes, 1))
    rate = human_bytes(written / max(result.seconds, 1e-9))
    _tell(f"{plan.target}: {len(plan.moves)} tensors, {human_bytes(plan.write_bytes)} in {result.seconds:.2f} s "
          f"({rate}/s)")
    if args.verify:
        _tell(f"verified: {result.compared} tensors read back, equal bit for bit")
    for line in result.errors:
        _tell(line)
    return True


def _tell(line: str) -> None:
    print(terminal.line(line), file=sys.stderr)
