"""Files that are read as a whole, within a limit: small ones of any kind, and a user's text."""

from __future__ import annotations

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


def read_text(path: str, most_bytes: int = LARGEST_BYTES, shorter: str = "Give a part of it: head -c 10M FILE.") -> str:
    """The text in a file, or on standard input where `path` is "-".

    Args:
        path: the file.
        most_bytes: more is refused; a device may have no end at all.
        shorter: what the user is told then.

    Raises:
        UserError: it cannot be read, is too long, or is not UTF-8; with the line.
    """
    name = "stdin" if path == "-" else path
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            contents = file.read(most_bytes + 1)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", name, "A text file is wanted.") from None
    if len(contents) > most_bytes:
        raise UserError(f"has more than {most_bytes} bytes", name, shorter)
    try:
        return contents.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 at byte {error.start}", f"{name}:{contents.count(10, 0, error.start) + 1}",
                        "Convert it: iconv -f GB18030 -t UTF-8.") from None
