"""Conversations in files: what /save writes, whole or not at all, and /load reads."""

from __future__ import annotations

import os
from typing import Any, Dict, Tuple

from .. import strict_json
from ..errors import UserError
from ..text_file import read_small
from ..whole_file import write_whole

_LARGEST_FILE_BYTES = 64 * 2 ** 20


class SavedChats:
    """The files that this conversation has written or read, which alone it may replace."""

    def __init__(self) -> None:
        self._own: Dict[str, Tuple[int, ...]] = {}

    def save(self, path: str, value: Any) -> None:
        """Write JSON beside `path` and put it in place.

        Raises:
            UserError: something is there that is not ours, or was changed by somebody else; it cannot be written.
        """
        if os.path.lexists(path):
            if path not in self._own:
                raise UserError("exists already", where=path, fix="Choose another name, or /load it first.")
            if _identity(path) != self._own[path]:
                raise UserError("was changed by another program since", where=path, fix="Choose another name.")
        try:
            write_whole(path, (strict_json.dumps(value, indent=1) + "\n").encode("utf-8"), path in self._own,
                        private=True)
        except FileExistsError:
            raise UserError("exists already", where=path, fix="Choose another name.") from None
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", where=path) from None
        self._own[path] = _identity(path)

    def load(self, path: str) -> Any:
        """The JSON in `path`.

        Raises:
            UserError: it cannot be read.
            ValueError: it is not JSON.
        """
        try:
            if not os.path.isfile(path) and os.path.exists(path):
                raise UserError("is not a file", where=path, fix="Give a file that /save has written.")
            data = read_small(path, _LARGEST_FILE_BYTES, "a conversation")
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", where=path) from None
        return strict_json.loads(data.decode("utf-8"))

    def loaded(self, path: str) -> None:
        """The conversation is now the one in `path`, which /save may replace from now on."""
        if not os.path.islink(path):
            self._own[path] = _identity(path)


def _identity(path: str) -> Tuple[int, ...]:
    try:
        found = os.lstat(path)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
