"""From what a user gives as a checkpoint to a folder on this machine: a path stays, a hub name is fetched."""

from __future__ import annotations

import sys

from .. import terminal
from ..device import env_rank
from . import names


def resolve(given: str, hub: str = "hf") -> str:
    """A path as it is; for a hub name the folder in the hub's cache, fetched first when it is not there.

    Args:
        given: path, or `OWNER/NAME[@REVISION]` of which no file or folder exists here.
        hub: one of `names.HUBS`.

    Raises:
        UserError: the model cannot be had whole.
    """
    name = names.parse(given)
    if name is None:
        return given
    if hub == "modelscope":
        from .modelscope import fetch
    else:
        from .huggingface import fetch
    return fetch(name, _tell)


def _tell(line: str) -> None:
    if env_rank() == 0:
        print(terminal.line(line), file=sys.stderr, flush=True)
