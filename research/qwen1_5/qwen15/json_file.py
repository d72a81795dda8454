"""Read a small JSON file, saying in one line what is wrong with it."""

from __future__ import annotations

import codecs
import json
from typing import Any

from . import odd_characters, strict_json
from .errors import UserError
from .text_file import read_small

_LARGEST_FILE_BYTES = 16 * 2 ** 20


def read_json(path: str, most_bytes: int = _LARGEST_FILE_BYTES) -> Any:
    """The contents of a JSON file of at most so many bytes.

    Raises:
        UserError: it is missing, too large or no JSON; with the line where that is known.
    """
    try:
        text = decoded(read_small(path, most_bytes, "a configuration"), path)
        return json.loads(text, parse_int=strict_json.integer)
    except FileNotFoundError:
        raise UserError("no such file", path, "Download the whole model folder, config.json included.") from None
    except json.JSONDecodeError as error:
        raise _not_json(error, path) from None
    except ValueError as error:
        raise UserError(f"not a configuration: {error}", path, "Download the file again.") from None
    except RecursionError:
        raise UserError("not a configuration: nested too deeply", path, "Download the file again.") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", path) from None


def decoded(content: bytes, path: str) -> str:
    """The text in a configuration file.

    Raises:
        UserError: it is not UTF-8.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError("is UTF-16 text", path, "Save it as UTF-8.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise UserError(f"not UTF-8 text (byte {error.start}, column {column})", f"{path}:{line}",
                        "Save it as UTF-8, or download the file again.") from None


def _not_json(error: json.JSONDecodeError, path: str) -> UserError:
    """What is wrong, and the character at that place when it only looks right."""
    where = f"{path}:{error.lineno}"
    # The parser stops at the character, or behind a key that it ends (a full-width colon).
    odd = odd_characters.first(error.doc[error.pos:error.pos + 1])
    if odd is not None:
        return UserError(f"not valid JSON: column {error.colno} is {odd.what}", where, odd.fix)
    return UserError(f"not valid JSON: {error.msg} (column {error.colno})", where, "Download the file again.")
