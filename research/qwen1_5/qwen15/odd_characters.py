"""Characters that look like YAML's and JSON's own and are not: word processors and Chinese keyboards write them."""

from __future__ import annotations

import unicodedata
from typing import Dict, NamedTuple, Optional

_NAMES: Dict[str, str] = {
    "\t": "tab", "\u00a0": "non-breaking space", "\u3000": "ideographic space", "\u202f": "narrow non-breaking space",
    "\u200b": "zero width space", "\u2060": "word joiner", "\ufeff": "byte order mark", "\u2028": "line separator",
    "\u201c": "opening typographic quote", "\u201d": "closing typographic quote", "\u201e": "low typographic quote",
    "\u2018": "opening typographic quote", "\u2019": "closing typographic quote", "\u00ab": "opening angle quote",
    "\u00bb": "closing angle quote", "\u2013": "dash", "\u2014": "dash", "\u2212": "minus sign",
}
_MEANT: Dict[str, str] = {
    "\u201c": '"', "\u201d": '"', "\u201e": '"', "\u2018": "'", "\u2019": "'", "\u00ab": '"', "\u00bb": '"',
    "\u2013": "-", "\u2014": "-", "\u2212": "-", "\u3001": ",", "\u3002": ".",
}


class Odd(NamedTuple):
    """One such character: its place in the text, from 0, and the sentences that name it and what to write instead."""

    place: int
    what: str
    fix: str


def first(text: str) -> Optional[Odd]:
    """The first character of `text` that only looks like one of YAML's or JSON's, None when there is none."""
    for index, character in enumerate(text):
        wide = "\uff01" <= character <= "\uff5e"
        name = _NAMES.get(character) or (unicodedata.name(character, "").lower() if wide or character in _MEANT else "")
        if name:
            meant = _MEANT.get(character) or (unicodedata.normalize("NFKC", character) if wide else "")
            code = f"U+{ord(character):04X}"
            what = f"{'an' if name[0] in 'aio' else 'a'} {name} ({code})"
            if meant:
                return Odd(index, what, f"Write {meant} instead.")
            fix = "Remove it." if unicodedata.category(character) == "Cf" else "Write spaces instead."
            return Odd(index, what, fix)
    return None


def outside_quotes(line: str) -> Optional[Odd]:
    """The first such character of a line of YAML that stands neither in quotes nor in a comment."""
    quote = ""
    for index, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character == "#" and (index == 0 or line[index - 1].isspace()):
            return None
        else:
            odd = first(character)
            if odd is not None:
                return odd._replace(place=index)
    return None
