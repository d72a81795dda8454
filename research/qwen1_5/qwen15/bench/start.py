"""The start of every measurement: its arguments are read, and what would stop it later is said before it begins."""

from __future__ import annotations

import argparse
from typing import List, Optional, Sequence, Tuple

from ..command_line import Parser
from . import hf, options


def start(parser: Parser, what: str, argv: Optional[Sequence[str]]
          ) -> Tuple[List[str], argparse.Namespace, Optional[str]]:
    """The arguments as they came and as they were read, and where the plot goes (None for none).

    Args:
        parser: of the measurement.
        what: its name.
        argv: its arguments.

    Raises:
        UserError: arguments that cannot be, no place for the plot, or --against something that is not installed.
    """
    given = list(argv or ())
    args = parser.parse_args(given)
    plot = options.plot_path(args, what)
    if getattr(args, "against", None) == "hf":
        hf.check_installed()
    return given, args, plot
