"""What a user is told when something is wrong, and the exit code that goes with it."""

from __future__ import annotations

import difflib
import errno
import os
import signal
import sys
import traceback
from typing import Callable, Iterable, Optional, Sequence

from . import start, terminal

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


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

    A `UserError` prints its one line, and so does a package that is not installed. Ctrl-C gives 130. Any other
    exception is a defect of ours: its last line is printed with the way to see the rest. `--debug` among the arguments
    (or `QWEN15_DEBUG=1`) shows tracebacks.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in arguments or os.environ.get("QWEN15_DEBUG") == "1"
    try:
        start.release()
        return _flushed(main, argv)
    except UserError as error:
        if debug:
            traceback.print_exc()
        _tell(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        if argv is None:  # the process ends now; a second Ctrl-C while it does so ends it at once and prints nothing
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        _tell("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _close_stdout()  # the reader has gone (`| head`)
        return EXIT_FAILED
    except Exception as error:  # the last stop before the user
        if debug:
            traceback.print_exc()
        missing = _missing_package(error)
        if missing:
            fix = "Install this program and its packages, `pip install .` in its folder, or use the Python that has it."
            _tell(f"error: {UserError(f'has no package {missing}', sys.executable, fix)}")
            return EXIT_FAILED
        summary = terminal.line(" ".join(f"{type(error).__name__}: {error}".split()))
        _tell(f"error: {summary} (unexpected; run again with --debug for the traceback)")
        return EXIT_FAILED


def _missing_package(error: Exception) -> str:
    """The package that a failed import needs; "" for another error, and for what should be in one that is there."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    return "" if not name or "." in name or name == __package__ else name


def _flushed(main: Callable[[Optional[Sequence[str]]], Optional[int]], argv: Optional[Sequence[str]]) -> int:
    """`main`'s exit code, when all that it has printed is out: a full disk is found here and not when Python ends."""
    try:
        try:
            code = main(argv) or EXIT_OK
        except SystemExit as ended:  # argparse, after --help
            code = ended.code if isinstance(ended.code, int) else EXIT_OK if ended.code is None else EXIT_FAILED
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except OSError as error:
        if error.filename is not None or error.errno not in _NO_ROOM:
            raise
        _close_stdout()
        raise UserError(f"cannot be written: {os.strerror(error.errno or 0)}", "the output",
                        exit_code=EXIT_FAILED) from None


def _tell(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # stderr is closed or full as well: only the exit code is left
        pass


def _close_stdout() -> None:
    """Point stdout elsewhere, so that the interpreter's own flush at its end does not fail for the same reason."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # not backed by a file
        pass
