"""The terminal: what may be written to it, and how the launcher lends it to rank 0 by job control, as a shell does."""

from __future__ import annotations

import os
import signal
import sys
import termios
import unicodedata
from typing import Optional, TextIO

VARIABLE = "QWEN15_TERMINAL"
"""Set by the launcher for a rank 0 whose stdin is its terminal: which of its streams (1, 2) are that terminal too."""


def shown(text: str, most: Optional[int] = None) -> str:
    """Text from elsewhere with what a terminal would obey made visible: ESC becomes `\\x1b`, a mark that turns text
    round `\\u202e`.

    Line ends are made visible too, so the result is one line. Tabs and every other character that is seen stay.

    Args:
        text: from a file, a peer or a user.
        most: characters to keep; what is cut off is marked by `...`.
    """
    if most is not None and len(text) > most:
        text = text[:most - 3] + "..."
    if text.isprintable():
        return text
    return "".join(character if character == "\t" or character.isprintable() or unicodedata.category(character) == "Zs"
                   else character.encode("unicode_escape").decode("ascii") for character in text)


MOST_CHARACTERS = 500
"""The longest line of a message. What tells it apart stands at its beginning, the way out of it at its end."""


def line(text: str) -> str:
    """A message as one line for a terminal: nothing in it steers, and of a long one the middle is left out."""
    text = shown(text)
    if len(text) <= MOST_CHARACTERS:
        return text
    left_out = f" [... {len(text) - MOST_CHARACTERS} more characters ...] "
    kept = MOST_CHARACTERS - len(left_out)
    return text[:kept - kept // 3] + left_out + text[-(kept // 3):]


_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def answer(text: str) -> str:
    """What a model says, for a terminal: characters that could move its cursor or rename its window are shown as
    `\\x1b`."""
    return text.translate(_CONTROL)


class Terminal:
    """The launcher's half. Until rank 0 reads, Ctrl-C is the launcher's and ends all; from then on it is rank 0's.

    Rank 0 is a process group of the launcher's session, in the background at first. There the system stops it when it
    reads from the terminal or changes its modes; the launcher sees that, lends it the terminal, and lets it go on.
    """

    def __init__(self):
        self._group = os.getpgrp()
        self._modes = termios.tcgetattr(0)
        self.lent = False
        # A background process may still write, and take the terminal back
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)

    @classmethod
    def find(cls) -> Optional["Terminal"]:
        """Our stdin when it is a terminal and we are in its foreground, else None."""
        try:
            return cls() if os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp() else None
        except (OSError, termios.error):  # a terminal, but not this session's
            return None

    @property
    def variable(self) -> str:
        """Value of `VARIABLE`."""
        name = os.ttyname(0)
        return "".join(str(stream) for stream in (1, 2) if os.isatty(stream) and os.ttyname(stream) == name)

    def lend(self, group: int) -> bool:
        """Put rank 0's process group in the foreground and let it go on; False while we are in the background
        ourselves."""
        try:
            if os.tcgetpgrp(0) not in (self._group, group):
                return False
            os.tcsetpgrp(0, group)
        except OSError:  # the terminal has been closed
            return False
        self.lent = True
        os.killpg(group, signal.SIGCONT)
        return True

    def take_back(self) -> None:
        """Be in the foreground again, with the terminal's modes as they were: a rank that was killed leaves it without
        echo."""
        if not self.lent:
            return
        self.lent = False
        try:
            os.tcsetpgrp(0, self._group)
            termios.tcsetattr(0, termios.TCSANOW, self._modes)
        except (OSError, termios.error):
            pass


def come_forward() -> TextIO:
    """Rank 0's half, before a conversation: have the terminal, also as stdout, which the launcher has copied until now.

    Without a launcher there is nothing to do.

    Returns:
        Where to write what is no answer, so that it comes in order with the answers: stderr unless that is the
        launcher's pipe.
    """
    streams = os.environ.get(VARIABLE)
    if streams is None or sys.stdin is None or not sys.stdin.isatty():
        return sys.stderr
    # The modes do not change, but setting them from the background stops the process until it gets the terminal.
    termios.tcsetattr(0, termios.TCSADRAIN, termios.tcgetattr(0))
    if "1" not in streams:
        return sys.stderr
    sys.stdout.flush()
    terminal = os.open(os.ttyname(0), os.O_WRONLY | os.O_NOCTTY)
    os.dup2(terminal, 1)
    os.close(terminal)
    return sys.stdout if "2" in streams else sys.stderr
