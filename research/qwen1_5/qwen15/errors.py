"""What a user is told when something is wrong, and the exit code that goes with it."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from typing import Callable, Iterable, Optional, Sequence

from . import terminal

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Something the user can mend: printed as one line, without a traceback.

    Args:
        what: what is wrong, with the numbers that show it.
        where: file and line, tensor, rank or flag it was found at.
        fix: what to change; a sentence of its own.
        exit_code: `EXIT_USAGE` for bad input (the default), `EXIT_FAILED` when the input was fine and the work failed.
    """

    def __init__(self, what: str, where: Optional[object] = None, fix: Optional[str] = None,
                 exit_code: int = EXIT_USAGE):
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.fix = fix
        self.exit_code = exit_code

    def __str__(self) -> str:
        line = self.what if self.where is None else f"{self.where}: {self.what}"
        if self.fix:
            line = f"{line.rstrip('.')}. {self.fix}"
        return terminal.line(" ".join(line.split()))


def did_you_mean(word: str, known: Iterable[str]) -> Optional[str]:
    """`Did you mean X?` for the known word nearest to `word`, or None when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"Did you mean {near[0]}?" if near else None


def run_main(main: Callable[[Optional[Sequence[str]]], Optional[int]], argv: Optional[Sequence[str]] = None) -> int:
    """Run a command line's `main` and turn every way it can end into an exit code.

    A `UserError` prints its one line. Ctrl-C gives 130. Any other exception is a defect of ours: its last line is
    printed with the way to see the rest. `--debug` among the arguments (or `QWEN15_DEBUG=1`) shows tracebacks.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in arguments or os.environ.get("QWEN15_DEBUG") == "1"
    try:
        return main(argv) or EXIT_OK
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our stdout has gone (`| head`). Point stdout elsewhere, so that the interpreter's own flush
        # at exit does not complain about the same pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:  # the last stop before the user
        if debug:
            traceback.print_exc()
        summary = terminal.line(" ".join(f"{type(error).__name__}: {error}".split()))
        print(f"error: {summary} (unexpected; run again with --debug for the traceback)", file=sys.stderr)
        return EXIT_FAILED
