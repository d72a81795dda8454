"""All commands under one name: `qwen15 VERB ...`, or `python -m qwen15 VERB ...` where it is not installed."""

from __future__ import annotations

import sys

from . import start

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Optional, Sequence


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one of `VERBS` with the rest of the arguments.

    Raises:
        UserError: there is no such verb, or what the verb raises.
    """
    import importlib

    from .errors import UserError, did_you_mean
    from .verbs import VERBS

    arguments = sys.argv[1:] if argv is None else list(argv)
    name, rest = (arguments[0], arguments[1:]) if arguments else ("help", [])
    if name in ("-V", "--version", "version"):
        print(f"qwen15 {version()}")
        return 0
    if name in ("-h", "--help", "help") and not rest:
        print(overview())
        return 0
    if name == "help":
        name, rest = rest[0], ["--help"]
    if name not in VERBS:
        near = did_you_mean(name, [*VERBS, "help", "--help", "--version"])
        raise UserError(f"{name!r} is not one of its commands", "qwen15", near or f"Known are {', '.join(VERBS)}.")
    return importlib.import_module(VERBS[name].module).main(rest) or 0


def overview() -> str:
    """Every verb in its group, one a line."""
    from .command_line import EXIT_CODES
    from .verbs import GROUPS, VERBS

    width = max(map(len, VERBS))
    lines = ["usage: qwen15 VERB [flags]; qwen15 VERB --help shows a verb's flags and examples"]
    for group, verbs in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:<{width}}  {verb.what}" for name, verb in verbs.items())]
    return "\n".join([*lines, "", EXIT_CODES])


def version() -> str:
    """The installed package's version."""
    from .installed import version_of  # half of what starting would take

    return version_of("qwen15-mindspore") or "(not installed: run from its source)"


def run() -> int:
    """Entry point of the `qwen15` script: exit codes as everywhere."""
    start.hold()
    from .errors import run_main

    return run_main(main)


if __name__ == "__main__":
    sys.exit(run())
