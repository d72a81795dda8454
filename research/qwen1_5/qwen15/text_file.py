"""Files that are read as a whole, within a limit: small ones of any kind, and a user's text."""

from __future__ import annotations

import sys

from .errors import UserError

LARGEST_BYTES = 256 * 2 ** 20


def read_small(path: str, most_bytes: int, what: str, fix: str = "Is this the right file?") -> bytes:
    """A small file whole. Its size is not asked for beforehand: a device or a pipe says 0 and may have no end.

    Raises:
        OSError: it cannot be read.
        UserError: it has more than `most_bytes`, too many for `what`.
    """
    with open(path, "rb") as file:
        contents = file.read(most_bytes + 1)
    if len(contents) > most_bytes:
        raise UserError(f"has more than {most_bytes} bytes, too many for {what}", path, fix)
    return contents


def read_text(path: str) -> str:
    """The text in a file, or on standard input where `path` is "-".

    Raises:
        UserError: it cannot be read, is not UTF-8, or has more than `LARGEST_BYTES` (a device may have no end at all).
    """
    try:
        if path == "-":
            contents = sys.stdin.buffer.read(LARGEST_BYTES + 1)
        else:
            with open(path, "rb") as file:
                contents = file.read(LARGEST_BYTES + 1)
        if len(contents) > LARGEST_BYTES:
            raise UserError(f"has more than {LARGEST_BYTES} bytes", path, "Give a part of it: head -c 10M FILE.")
        return contents.decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", path, "A text file is wanted.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 at byte {error.start}", path, "Convert it: iconv -f GB18030 -t UTF-8.") from None
