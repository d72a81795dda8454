"""What an examination says of one thing: found, judged, and how to mend it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

OK, WARN, FAIL, INFO = "ok", "warn", "fail", "info"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: of the thing, one or two words.
        status: OK, WARN (works, less well, or may not), FAIL (will not work) or INFO.
        detail: what was found.
        fix: what to do about it, None where nothing is to be done.
    """

    name: str
    status: str
    detail: str
    fix: Optional[str] = None
