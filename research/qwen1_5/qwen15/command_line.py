"""Command lines: a wrong flag or value gets one line with what was meant, and --help one line of usage and examples."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from typing import Any, Callable, List, NoReturn, Optional, Sequence, Tuple

from .errors import UserError, did_you_mean

EXIT_CODES = "exit codes: 0 fine, 1 failed, 2 usage or bad input, 130 interrupted"
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63\uff0d"
"""What word processors and web pages make of a hyphen."""
_MOST_DIGITS = 30


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a `UserError` where argparse prints its usage and ends the process.

    Args:
        prog: the command as a user types it.
        description: what it does, one sentence.
        examples: command lines; shown by --help.
        exit_codes: what the exit code says.
        usage: after `prog`; by default `[flags]`.
    """

    def __init__(self, prog: str, description: str, examples: Sequence[str] = (), exit_codes: str = EXIT_CODES,
                 usage: str = "[flags]", **more: Any):
        shown = "\n".join(["examples:", *(f"  {example}" for example in examples), ""]) if examples else ""
        super().__init__(prog=prog, description=description, usage=f"{prog} {usage}".rstrip(),
                         epilog=f"{shown}\n{exit_codes}" if shown else exit_codes,
                         formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, exit_on_error=False,
                         **more)

    def parse_args(self, args: Optional[Sequence[str]] = None,  # type: ignore[override]
                   namespace: Optional[argparse.Namespace] = None) -> argparse.Namespace:
        """Parse everything.

        Raises:
            UserError: an unknown flag, a missing or wrong value, an argument too many.
        """
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            raise self._unknown(rest[0])
        return parsed

    def parse_known_args(self, args: Any = None,  # type: ignore[override]
                         namespace: Any = None) -> Tuple[argparse.Namespace, List[str]]:
        """As argparse's, with a `UserError` for a wrong value."""
        self._words = [str(word) for word in (sys.argv[1:] if args is None else args)]
        try:
            return super().parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            raise self._wrong(error.argument_name or self.prog, error.message) from None

    def print_help(self, file: Optional[Any] = None) -> None:
        """Print the help; unlike argparse, not silent when it cannot be written."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        """What argparse still reports by itself.

        Raises:
            UserError: always.
        """
        missing = re.fullmatch(r"the following arguments are required: (.*)", message)
        if missing:
            flags = {flag for action in self._actions for flag in action.option_strings}
            for word in self._words:  # a flag that is misspelt is missing, and is better named as it was written
                if word.startswith("--") and word != "--" and word.split("=", 1)[0] not in flags:
                    raise self._unknown(word)
            hidden = {action.dest for action in self._actions if action.help == argparse.SUPPRESS}
            names = [name for name in missing[1].split(", ") if name not in hidden]
            raise UserError(f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing", self.prog,
                            f"{self.prog} --help shows what they are." if len(names) > 1 else
                            f"{self.prog} --help shows what it is.")
        name, _, rest = message.partition(": ")
        raise self._wrong(name.replace("argument ", ""), rest or message)

    def _wrong(self, name: str, message: str) -> UserError:
        """The line for a value that cannot be; `message` is argparse's."""
        flag = name.split("/")[-1]
        typed = re.fullmatch(r"invalid (\w+) value: (.*)", message)
        chosen = re.match(r"invalid choice: (.*?)(?: \(choose from .*)?$", message)
        if typed:
            kind = {"int": "a whole number", "float": "a number"}.get(typed[1], f"a {typed[1]}")
            return UserError(f"wants {kind}, not {typed[2]}", flag)
        if chosen:
            given = chosen[1].strip("'\"")
            choices = [str(choice) for choice in self._choices(name)]
            return UserError(f"wants one of {', '.join(choices)}, not {given!r}", flag, did_you_mean(given, choices))
        if message.startswith("expected"):
            return UserError("a value is missing", flag,
                             f"One that begins with a hyphen is written with an equals sign: {flag}=-...")
        return UserError(message, flag)

    def _choices(self, name: str) -> Sequence[Any]:
        for action in self._actions:
            if name in ("/".join(action.option_strings), action.metavar, action.dest):
                return list(action.choices or ())
        return ()

    def _unknown(self, word: str) -> UserError:
        """The line for an argument that nothing takes."""
        word = word.split("=", 1)[0] if word.startswith("-") else word
        flags = [flag for action in self._actions for flag in action.option_strings if action.help != argparse.SUPPRESS]
        if word[:1] in tuple(_DASHES):
            meant = "--" + word.lstrip(_DASHES + "-").split("=", 1)[0]
            return UserError(f"{word!r} begins with U+{ord(word[0]):04X}, which only looks like a hyphen", self.prog,
                             f"Did you mean {meant}?" if meant in flags else "Flags begin with two hyphens: --")
        if word.startswith("-"):
            fix = did_you_mean(word.replace("-", "_").replace("__", "--", 1), flags) or did_you_mean(word, flags)
            return UserError(f"{word} is not one of its flags", self.prog, fix or f"{self.prog} --help lists them.")
        return UserError(f"{word!r} is not expected", self.prog,
                         "Put words that belong together in quotes." if flags else None)


def program(verb: str, script: str) -> str:
    """The command as it was typed: the script of that name, or else `qwen15 VERB`."""
    return script if os.path.basename(sys.argv[0]) == script else f"qwen15 {verb}"


def boolean(text: str) -> bool:
    """argparse type of a flag that takes true or false, in any case."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    known = {"true": "True", "yes": "True", "on": "True", "1": "True", "false": "False", "no": "False", "off": "False",
             "0": "False"}
    near = difflib.get_close_matches(text.strip().lower(), known, n=1)
    meant = known[near[0]] if near else None
    hint = f". Did you mean {meant}?" if meant else ""
    raise argparse.ArgumentTypeError(f"wants True or False, not {text!r}{hint}")


def whole(text: str) -> int:
    """argparse type of a flag that takes a whole number."""
    if re.fullmatch(rf"[+-]?[0-9]{{1,{_MOST_DIGITS}}}", text):
        return int(text)
    if re.fullmatch(r"[+-]?[0-9]+", text):
        raise argparse.ArgumentTypeError(f"{len(text)} digits are too many for any number here")
    raise argparse.ArgumentTypeError(f"wants a whole number, not {text!r}{_meant(text, whole_only=True)}")


def whole_from(least: int, most: Optional[int] = None, why: str = "") -> Callable[[str], int]:
    """argparse type of a flag that takes a whole number from `least` to `most`; `why` ends what is said of less."""
    def read(text: str) -> int:
        found = whole(text)
        if found < least:
            raise argparse.ArgumentTypeError(f"wants at least {least}, not {found}{why}")
        if most is not None and found > most:
            raise argparse.ArgumentTypeError(f"wants at most {most}, not {found}")
        return found

    return read


positive = whole_from(1)
"""argparse type of a count."""


def number(text: str) -> float:
    """argparse type of a flag that takes a number."""
    try:
        return float(text) if len(text) <= 400 else float("x")
    except ValueError:
        raise argparse.ArgumentTypeError(f"wants a number, not {text[:40]!r}{_meant(text)}") from None


def _meant(text: str, whole_only: bool = False) -> str:
    """The number that was meant, as the end of a message: 0,7 is 0.7 and 1e3 is 1000."""
    try:
        value = float(text.replace(",", ".").replace("\uff0e", ".").strip() if len(text) <= 40 else "x")
    except ValueError:
        return ""
    if value != value or abs(value) > 1e15:
        return ""
    if whole_only:
        return f". Did you mean {int(value)}?" if value == int(value) else ""
    return f". Did you mean {value:g}?"
