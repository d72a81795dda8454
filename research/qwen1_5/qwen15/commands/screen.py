"""The terminal of a conversation: questions with line editing and history, answers as they come, notes beside."""

from __future__ import annotations

import os
import sys
from typing import Any, Callable, List, Optional

from .. import terminal
from ..reporting import Reporter
from .results import printable

_PROMPT, _MORE = "> ", ". "
_QUOTES = '"' * 3
_MOST_HISTORY_LINES = 1000


class Screen:
    """Questions from stdin, answers to stdout, notes to stderr. On a terminal with line editing and history.

    Args:
        report: what it says from now on comes in order with notes and answers.
        complete: what may stand in place of the words before the cursor, for the Tab key.

    Attributes:
        interactive: stdin is a terminal; otherwise its lines are the questions, and no prompt is shown.
    """

    def __init__(self, report: Reporter, complete: Callable[[str], List[str]]):
        self._notes = report.stream = terminal.come_forward()
        self.interactive = sys.stdin is not None and sys.stdin.isatty()
        self._tty_out = sys.stdout.isatty()
        self._at_line_start = True
        self._history: Optional[History] = None
        if sys.stdin is not None and hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")
        if self.interactive:
            self._history = History.open(report)
            _complete_with(complete)

    def read(self) -> Optional[str]:
        """The next message, None when there is none any more. Raises KeyboardInterrupt."""
        text = self._line(_PROMPT)
        if text is None or not text.strip().startswith(_QUOTES):
            return text
        text = text.strip()[len(_QUOTES):]
        while not text.rstrip().endswith(_QUOTES):
            more = self._line(_MORE)
            if more is None:
                return None
            text = f"{text}\n{more}"
        return text.rstrip()[:-len(_QUOTES)].strip("\n")

    def edit(self, text: str) -> Optional[str]:
        """Let the user change `text`; None where lines cannot be edited, or when it spans several. Raises
        KeyboardInterrupt."""
        if self._history is None or not self._tty_out or "\n" in text:
            return None
        import readline

        readline.set_startup_hook(lambda: readline.insert_text(printable(text)))
        try:
            return self._line(_PROMPT) or ""
        finally:
            readline.set_startup_hook(None)

    def _line(self, prompt: str) -> Optional[str]:
        try:
            if self.interactive and self._tty_out:
                return input(prompt)
            if self.interactive:
                self._notes.write(prompt)
                self._notes.flush()
            line = sys.stdin.readline() if sys.stdin is not None else ""
            return line.rstrip("\r\n") if line else None
        except EOFError:
            if self._tty_out:
                self.write("\n")
            return None

    def write(self, text: str) -> None:
        """More of an answer."""
        if text:
            sys.stdout.write(terminal.answer(printable(text)) if self._tty_out else printable(text))
            sys.stdout.flush()
            self._at_line_start = text.endswith("\n")

    def end_answer(self) -> None:
        """An answer has ended: the next thing begins on a line of its own."""
        if not self._at_line_start or not self._tty_out:
            self.write("\n")

    def note(self, line: str) -> None:
        """Something that is no answer."""
        if self._tty_out and not self._at_line_start:
            self.write("\n")
        shown = "\n".join(map(terminal.line, line.split("\n")))
        print(shown, file=self._notes, flush=True)

    def close(self) -> None:
        """Write the history."""
        if self._history is not None:
            self._history.close()


def _complete_with(complete: Callable[[str], List[str]]) -> None:
    """Let the Tab key offer what `complete` gives for the line up to the cursor, where Python has readline."""
    try:
        import readline
    except ImportError:
        return
    found: List[str] = []

    def offer(word: str, number: int) -> Optional[str]:
        nonlocal found
        if number == 0:
            found = complete(readline.get_line_buffer()[:readline.get_endidx()])
        return found[number] if number < len(found) else None

    readline.set_completer_delims(" \t\n")
    readline.set_completer(offer)
    editline = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if editline else "tab: complete")


class History:
    """The lines typed in earlier sessions, in a file of the user's state folder."""

    def __init__(self, path: str, readline: Any, report: Reporter):
        self._path, self._readline, self._report = path, readline, report
        self._before = readline.get_current_history_length()

    @classmethod
    def open(cls, report: Reporter) -> Optional["History"]:
        """Turn line editing on and read the history; None where Python has no readline."""
        try:
            import readline
        except ImportError:
            return None
        path = history_path()
        readline.set_history_length(_MOST_HISTORY_LINES)
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            readline.read_history_file(path)
        except OSError as error:
            report.warning(f"note: the history of typed lines is not kept: {path}: {error.strerror}")
            return None
        return cls(path, readline, report)

    def close(self) -> None:
        """Append what was typed in this session."""
        new = self._readline.get_current_history_length() - self._before
        try:
            if new > 0:
                self._readline.append_history_file(new, self._path)
        except OSError as error:
            self._report.warning(f"note: the history of typed lines is not kept: {self._path}: {error.strerror}")


def history_path() -> str:
    """$XDG_STATE_HOME/qwen15/chat_history, by default below ~/.local/state."""
    base = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):  # the specification: a relative one is ignored
        base = os.path.join(os.path.expanduser("~"), ".local", "state")
    return os.path.join(base, "qwen15", "chat_history")
