"""A user's text as a whole: a file, or standard input."""

from __future__ import annotations

import sys

from .errors import UserError

LARGEST_BYTES = 256 * 2 ** 20


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
