"""Ctrl-C while a command imports: held back until `errors.run_main` can tell of it in a line.

A command calls `hold` before its other imports, which take long enough to be interrupted, and would end in a traceback.
"""

from __future__ import annotations

import signal

_before = None


def hold() -> None:
    """Keep SIGINT pending from here on."""
    global _before
    _before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def release() -> None:
    """Undo `hold`, where it was called: a SIGINT that has come meanwhile is a KeyboardInterrupt here."""
    global _before
    before, _before = _before, None
    if before is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
