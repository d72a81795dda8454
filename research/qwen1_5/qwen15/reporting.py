"""What a run says on stderr beside its answer, by level; MindSpore's own chatter is kept out of it."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import contextmanager, redirect_stdout
from typing import Callable, Iterator, Optional, Sequence, Set, TextIO

from . import terminal
from .device import env_rank

LEVELS = ("error", "warning", "info", "debug")
"""Values of --log_level. info adds what was loaded and how fast it ran; debug what MindSpore itself has to say."""


class Reporter:
    """Says things on stderr, on rank 0 only: the other ranks would say the same.

    Args:
        level: one of `LEVELS`; lines below it are dropped.

    Attributes:
        stream: where to, None for stderr.
    """

    def __init__(self, level: str):
        self.stream: Optional[TextIO] = None
        self._most = LEVELS.index(level)
        self._said: Set[str] = set()

    def error(self, line: str) -> None:
        """Why a run ends early."""
        self._say("error", line)

    def info(self, line: str) -> None:
        """What was done, and numbers."""
        self._say("info", line)

    def warning(self, line: str) -> None:
        """What the user may not have meant. The same line is said once."""
        if line not in self._said:
            self._said.add(line)
            self._say("warning", line)

    def debug(self, line: str) -> None:
        """Details for whoever looks for the cause of something."""
        self._say("debug", line)

    def shows(self, level: str) -> bool:
        """Whether lines of this level are shown on this rank."""
        return LEVELS.index(level) <= self._most and env_rank() == 0

    def _say(self, level: str, line: str) -> None:
        if self.shows(level):
            print("\n".join(map(terminal.line, line.split("\n"))), file=self.stream or sys.stderr, flush=True)


def begin(level: str, notes: Sequence[str]) -> Reporter:
    """A run's reporter, when it has said what was noted in the configuration; frameworks are quiet from now on."""
    report = Reporter(level)
    for note in notes:
        report.warning(note)
    quiet_frameworks(level)
    return report


def quiet_frameworks(level: str) -> None:
    """Keep what MindSpore, MindFormers and NumPy warn about off the terminal, except at level debug.

    Acts before they are imported. What the user has set (GLOG_v, -W, PYTHONWARNINGS) stays.
    """
    if level == "debug":
        return
    os.environ.setdefault("GLOG_v", "3")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


@contextmanager
def frameworks_quiet() -> Iterator[None]:
    """`quiet_frameworks` for a while, in a program that is not ours: its own warnings come as before afterwards."""
    os.environ.setdefault("GLOG_v", "3")
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield


def set_encoding(json: bool) -> None:
    """Let stdout take any text: JSON is UTF-8 always, text becomes `?` where the terminal's encoding has no such
    character."""
    reconfigure: Callable[..., None] = getattr(sys.stdout, "reconfigure", lambda **_: None)
    if json:
        reconfigure(encoding="utf-8")
    else:
        reconfigure(errors="replace")


@contextmanager
def stdout_to_stderr() -> Iterator[TextIO]:
    """While libraries are imported, build and compile, what they print goes to stderr: stdout is the answer's alone.

    Gives the real stdout.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr), open(kept, "w", encoding=sys.stdout.encoding, closefd=False) as stdout:
            yield stdout
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
