"""How far long work has come: bytes, rate and time left on one line of stderr; silent when it is no terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


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


def byte_bar(label: str, total_bytes: int) -> tqdm:
    """A progress bar that counts bytes (`update`) and is removed when the `with` block ends.

    Args:
        label: what is being done, one word.
        total_bytes: when it is done.
    """
    from tqdm import tqdm

    return tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True, leave=False, dynamic_ncols=True, disable=None)


def skip(bar: tqdm, nbytes: int) -> None:
    """Count bytes that needed no work; they do not enter the rate."""
    if not bar.disable:
        bar.initial += nbytes
        bar.update(nbytes)
