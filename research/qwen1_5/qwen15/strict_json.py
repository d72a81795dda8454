"""JSON as RFC 8259 has it, in and out: no NaN or Infinity, no ambiguous number, bounded depth and digits."""

from __future__ import annotations

import json
import math
from typing import Any, Dict, List, Tuple

_MOST_DIGITS = 400
"""Python refuses to read integers of more than 4300 digits; where it does not, its time grows with their square."""


def loads(text: str, *, once: bool = False) -> Any:
    """The value that `text` holds.

    Args:
        text: JSON.
        once: refuse objects in which a key is given twice.

    Raises:
        ValueError: with the rest of the sentence "`file` ...": what is wrong and in which column.
    """
    try:
        return json.loads(text, parse_constant=_constant, parse_float=_finite, parse_int=integer,
                          object_pairs_hook=_once if once else None)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} ({_place(error)})") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _place(error: json.JSONDecodeError) -> str:
    return f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"


def _constant(text: str) -> Any:
    raise ValueError(f"is not JSON: {text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"holds {text[:20]}, which is larger than any number a computer calculates with")
    return value


def integer(text: str) -> int:
    """A whole number of JSON. Raises ValueError for more digits than any number has a use for."""
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"holds a number of {len(text)} digits")
    return int(text)


def _once(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"gives {twice!r} twice")
    return made


def dumps(value: Any, **form: Any) -> str:
    """`value` as JSON, characters as they are where they have a UTF-8 form; NaN and infinity become null.

    Separators that some readers take for line ends (U+0085, U+2028, U+2029) are escaped; so is everything when there is
    a lone surrogate, which has no UTF-8 form.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, **form)
    except ValueError:
        value = _without_infinity(value)
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, **form)
    for separator in "\x85\u2028\u2029":
        text = text.replace(separator, f"\\u{ord(separator):04x}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, **form)
    return text


def _without_infinity(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_infinity(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinity(item) for item in value]
    return value
