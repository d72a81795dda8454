"""What measurements that start processes share: where those find this package, why one has failed, its peak memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict

from ..errors import EXIT_FAILED, UserError

ROOT = str(Path(__file__).resolve().parents[2])
"""The folder of the package and its scripts."""


def environment() -> Dict[str, str]:
    """This process' own, and modules come from `ROOT` first."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))}


def check(code: int, errors: str, what: str, where: str) -> None:
    """Raises UserError, with the last line of what it said on stderr, when process `what` has not ended with code 0."""
    if code:
        last = (errors.strip().splitlines() or [f"exit code {code}"])[-1]
        raise UserError(f"{what} failed: {last}", where=where, exit_code=EXIT_FAILED)


def peak_bytes(process: object = "self") -> int:
    """The most memory a process, given by its number, has had resident; 0 when it has ended."""
    try:
        with open(f"/proc/{process}/status", encoding="ascii") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")), 0)
    except OSError:
        return 0
