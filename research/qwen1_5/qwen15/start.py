"""First thing in a command: Ctrl-C while it imports is held back until `errors.run_main` can tell of it in a line.

A command calls `hold` before its other imports, which take long enough to be interrupted, and would end in a traceback.
Whether somebody has called it tells a command's process from a program that imports the package.
"""

from __future__ import annotations

import signal

_before = None
_is_command = False


def is_command() -> bool:
    """Whether this process is a command's, which decides about its signals, and not another program's."""
    return _is_command


def hold() -> None:
    """Keep SIGINT pending from here on."""
    global _before, _is_command
    _is_command = True
    _before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def release() -> None:
    """Undo `hold`, where it was called: a SIGINT that has come meanwhile is a KeyboardInterrupt here."""
    global _before
    before, _before = _before, None
    if before is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
