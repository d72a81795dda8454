"""`qwen15 completion SHELL`: the script with which a shell completes commands, flags, values and file names.

shtab writes it from the parsers themselves, so that it knows what they know; nothing of this package runs when a user
presses Tab.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any, Dict, Optional, Sequence

from .command_line import Parser, boolean
from .errors import UserError
from .verbs import VERBS, parsers

SHELLS = ("bash", "zsh", "tcsh")
_FILES = {"FILE", "PATH", "YAML", "TEXT_FILE", "LOAD_CHECKPOINT", "VOCAB_FILE", "MERGES_FILE"}
_FOLDERS = {"DIR", "FOLDER"}
"""What a flag's placeholder says about its value."""


def parser() -> Parser:
    """The command line."""
    made = Parser("qwen15 completion", "Print a script that completes qwen15's commands, flags and values with Tab.", [
        "source <(qwen15 completion bash)",
        'eval "$(qwen15 completion zsh)"',
        "qwen15 completion tcsh > ~/.qwen15.tcsh"], usage="SHELL")
    made.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"one of {', '.join(SHELLS)}")
    return made


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Print the script.

    Raises:
        UserError: shtab is not installed.
    """
    args = parser().parse_args(argv)
    try:
        import shtab
    except ImportError:
        raise UserError("the Python package shtab is missing", "qwen15 completion", "Run: pip install shtab") from None
    print(shtab.complete(whole(shtab), shell=args.shell))
    return 0


def whole(shtab: Any) -> argparse.ArgumentParser:
    """One plain parser of all commands, as shtab wants it."""
    root = argparse.ArgumentParser("qwen15")
    root.add_argument("--version", action="store_true", help="show the version")
    verbs = root.add_subparsers(metavar="VERB")
    made = {name: verbs.add_parser(name, help=verb.what) for name, verb in VERBS.items()}
    below: Dict[str, Any] = {}
    for name, source in parsers():
        verb, _, part = name.partition(" ")
        if part:
            if verb not in below:
                below[verb] = made[verb].add_subparsers(metavar="WHAT")
            _copy(source, below[verb].add_parser(part, help=source.description), shtab)
        elif not any(action.nargs == argparse.REMAINDER for action in source._actions):
            _copy(source, made[verb], shtab)
    return root


def _copy(source: Parser, made: argparse.ArgumentParser, shtab: Any) -> None:
    """Give a plain parser the flags of one of ours, and say what completes their values."""
    for action in source._actions:
        if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        copied: Any = made._add_action(copy.copy(action))
        if action.type is boolean:
            copied.choices = ("True", "False")
        elif str(action.metavar) in _FILES:
            copied.complete = shtab.FILE
        elif str(action.metavar) in _FOLDERS:
            copied.complete = shtab.DIRECTORY
