"""The generated parts of Markdown pages: what stands between two marker lines is replaced, the rest stays."""

from __future__ import annotations

import sys

from ..errors import UserError
from ..whole_file import write_whole


def updated(document: str, name: str, part: str) -> str:
    """`document` with `part` between the markers called `name`.

    Raises:
        ValueError: the markers are not there.
    """
    begin, end = markers(name)
    start, stop = document.index(begin), document.index(end)
    return f"{document[:start]}{begin}\n\n{part}\n\n{document[stop:]}"


def markers(name: str) -> tuple[str, str]:
    """The two lines, which Markdown does not show."""
    return f"<!-- begin: {name} -->", f"<!-- end: {name} -->"


def update(path: str, name: str, part: str) -> None:
    """Put `part` between the markers called `name` in the file `path`, and say on stderr whether that changed it.

    Raises:
        UserError: the file cannot be read or written, or has no such markers.
    """
    try:
        with open(path, encoding="utf-8") as file:
            old = file.read()
        new = updated(old, name, part)
        if new != old:
            write_whole(path, new.encode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot be updated: {error.strerror}", path) from None
    except ValueError:
        raise UserError("has no markers", path, f"Put {' and '.join(markers(name))} where the part goes.") from None
    print(f"{path}: {'updated' if new != old else 'was current'}", file=sys.stderr)
