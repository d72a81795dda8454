"""How far long work has come: bytes, rate and time left on one line of stderr; silent when it is no terminal."""

import sys
import time
from typing import Optional, TextIO

_EVERY_S = 0.2


def human_bytes(count: float) -> str:
    """A number of bytes as people read it, in powers of 1000: 812 B, 3.10 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def human_time(seconds: float) -> str:
    """A duration as people read it: 42s, 3m07s, 2h05m."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """A line that is rewritten in place; leaving it (`with`) takes it away.

    Args:
        label: what is being done, one word.
        total_bytes: when it is done.
        stream: where to; stderr if not given.
    """

    def __init__(self, label: str, total_bytes: int, stream: Optional[TextIO] = None):
        self._label, self._total = label, total_bytes
        self._stream = sys.stderr if stream is None else stream
        self._shown = self._stream.isatty()
        self._begin = time.monotonic()
        self._done = 0
        self.skipped_bytes = 0
        self._next = self._begin
        self._width = 0

    def skip(self, nbytes: int) -> None:
        """Count bytes that needed no work; they do not enter the rate."""
        self.skipped_bytes += nbytes
        self._done += nbytes

    def advance(self, nbytes: int) -> None:
        """Count bytes that are done."""
        self._done += nbytes
        now = time.monotonic()
        if self._shown and now >= self._next:
            self._next = now + _EVERY_S
            self._show(self.line(now - self._begin))

    def line(self, elapsed_s: float) -> str:
        """The line for a time since the start."""
        worked = self._done - self.skipped_bytes
        share = 100 * self._done / self._total if self._total else 100
        text = f"{self._label}: {share:3.0f}%  {human_bytes(self._done)} of {human_bytes(self._total)}"
        if worked and elapsed_s > 0:
            left_s = (self._total - self._done) * elapsed_s / worked
            text += f"  {human_bytes(worked / elapsed_s)}/s  {human_time(left_s)} left"
        return text

    def _show(self, text: str) -> None:
        self._stream.write("\r" + text.ljust(self._width))
        self._stream.flush()
        self._width = len(text)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> float:
        """Take the line away; returns the seconds since the start."""
        if self._shown and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
        return time.monotonic() - self._begin
