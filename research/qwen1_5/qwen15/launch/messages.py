"""What launchers say to each other: lines of JSON, taken apart with every field checked."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Dict, Tuple

from .. import strict_json
from ..errors import EXIT_FAILED
from ..terminal import shown

_MOST_LINES, _MOST_CHARACTERS = 20, 1000  # of a log, of one text

Message = Dict[str, Any]

NONSENSE = (ValueError, TypeError, KeyError)
"""What taking apart a line of somebody who is no launcher raises."""


@dataclass(frozen=True)
class Report:
    """A failure, as the machine it happened on tells it.

    Attributes:
        where: `rank 3 on machine 1`, or what else is to blame.
        what, fix: as in a `UserError`.
        code: exit code of the run.
        log: path of the culprit's log there; empty for none.
        lines: its last lines.
    """

    where: str
    what: str
    fix: str = ""
    code: int = EXIT_FAILED
    log: str = ""
    lines: Tuple[str, ...] = ()

    @classmethod
    def of(cls, value: Any) -> "Report":
        """From the wire. Raises one of `NONSENSE` when it is none."""
        texts = {name: text(value[name]) for name in ("where", "what", "fix", "log")}
        lines = tuple(text(line) for line in value["lines"][-_MOST_LINES:])
        code = whole(value["code"])
        if not 0 < code < 256:
            raise ValueError(f"{code} is not the exit code of a failure")
        return cls(**texts, code=code, lines=lines)


@dataclass(frozen=True)
class Machine:
    """Who a launcher is.

    Attributes:
        number: its NODE_RANK.
        first, count: its ranks.
        worker_num: ranks on all machines, as it was told.
    """

    number: int
    first: int
    count: int
    worker_num: int

    @classmethod
    def of(cls, value: Any) -> "Machine":
        """From the wire. Raises one of `NONSENSE` when it is none."""
        return cls(**{name: whole(value[name]) for name in ("number", "first", "count", "worker_num")})

    @property
    def name(self) -> str:
        """`machine 1 (ranks 2 to 3)`."""
        ranks = f"rank {self.first}" if self.count == 1 else f"ranks {self.first} to {self.first + self.count - 1}"
        return f"machine {self.number} ({ranks})"

    @property
    def line(self) -> str:
        """As it is proved: the same text on both sides."""
        return json.dumps(asdict(self), sort_keys=True)


def text(value: Any) -> str:
    """Text of another machine, fit for a terminal."""
    if not isinstance(value, str):
        raise TypeError("not a text")
    return shown(value, _MOST_CHARACTERS)


def whole(value: Any) -> int:
    """A whole number of a size that ranks, machines and exit codes have."""
    if type(value) is not int or not 0 <= value < 2 ** 31:
        raise ValueError("not a whole number")
    return value


def encode(message: Message) -> bytes:
    """A line."""
    return json.dumps(message, allow_nan=False).encode() + b"\n"


def decode(line: bytes) -> Message:
    """A line taken apart. Raises one of `NONSENSE` when it is not an object of strict JSON."""
    message = strict_json.loads(line.decode("utf-8"))
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message
