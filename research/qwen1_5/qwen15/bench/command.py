"""The bench's command line: one sub-command per thing that can be measured."""

import argparse
from typing import Optional, Sequence

from . import make_checkpoint


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Parse and run; returns the exit code. Raises UserError for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m qwen15.bench", description="Measure, and compare with others.")
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    make_checkpoint.add_parser(commands)
    commands.add_parser("numerics", add_help=False, help="how close logits are to transformers', for each dtype")
    args, rest = parser.parse_known_args(argv)
    if args.what == "numerics":
        from . import numerics

        return numerics.main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args.run(args)
