"""A regular expression that finds any of many texts, in a time that does not grow with their number."""

from __future__ import annotations

import re
from typing import Dict, Iterable, List, Optional


def one_of(texts: Iterable[str]) -> Optional[re.Pattern[str]]:
    """A regular expression that captures any of the texts, the longest first; None when there are none.

    What texts have in common stands in it once, so that at every place one character decides: an alternative for each
    of 100 000 texts would be tried one by one.
    """
    ordered = sorted(set(texts))
    if not ordered:
        return None
    try:
        return re.compile(f"({_pattern(ordered, 0)})")
    except RecursionError:  # hundreds of texts, each of which begins the next one
        return plain_one_of(ordered)


def plain_one_of(texts: Iterable[str]) -> re.Pattern[str]:
    """The definition of `one_of`."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(texts, key=len, reverse=True)))})")


def _pattern(texts: List[str], start: int) -> str:
    """What matches the texts from their character `start` on; they are sorted and equal up to there."""
    shared = len(_common(texts[0], texts[-1], start))
    head, place = re.escape(texts[0][start:start + shared]), start + shared
    ends = len(texts[0]) == place
    by_next: Dict[str, List[str]] = {}
    for text in texts[ends:]:
        by_next.setdefault(text[place], []).append(text)
    if not by_next:
        return head
    rest = "|".join(_pattern(group, place) for group in by_next.values())
    if ends:
        return f"{head}(?:{rest})?"
    return f"{head}(?:{rest})" if len(by_next) > 1 else head + rest


def _common(first: str, last: str, start: int) -> str:
    """The characters from `start` on that two texts share, and with them all that are sorted between them."""
    end = start
    while end < min(len(first), len(last)) and first[end] == last[end]:
        end += 1
    return first[start:end]
