"""Read a small JSON file, saying in one line what is wrong with it."""

from __future__ import annotations

import json
import os
from typing import Any

from .errors import UserError

_LARGEST_FILE_BYTES = 16 * 2 ** 20


def read_json(path: str) -> Any:
    """The contents of a small JSON file; a `UserError` names file and line of what is wrong with it."""
    try:
        if os.path.getsize(path) > _LARGEST_FILE_BYTES:
            raise UserError(f"{os.path.getsize(path)} bytes are too many for a configuration", path,
                            "Is this the right file?")
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise UserError("no such file", path, "Download the whole model folder, config.json included.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error.msg}", f"{path}:{error.lineno}", "Download the file again.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text (byte {error.start})", path, "Download the file again.") from None
    except RecursionError:
        raise UserError("not a configuration: nested too deeply", path, "Download the file again.") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", path) from None
