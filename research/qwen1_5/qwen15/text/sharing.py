"""Long texts and many texts shared out among the processors: cut where it changes no token, in even groups."""

from __future__ import annotations

import re
from typing import Iterator, List, Tuple

SLICE = 1 << 16
"""Characters of a long text that one thread takes at a time."""
_LINE_START = re.compile(r"(?<=\n)\S")


def sliced(text: str) -> Iterator[str]:
    """`text` in slices of at least `SLICE` characters that are encoded as if they had not been cut.

    The cut is after a line end that no blank follows: there a piece always ends (qwen15.text.bpe.PIECES), and neither
    NFC nor a control token reaches across.
    """
    start = 0
    while len(text) - start >= 2 * SLICE:
        cut = _LINE_START.search(text, start + SLICE)
        if cut is None:
            break
        yield text[start:cut.start()]
        start = cut.start()
    if start < len(text) or not text:
        yield text[start:]


def even_groups(pieces: List[Tuple[int, str]], count: int) -> List[List[Tuple[int, str]]]:
    """`pieces` in order, in about `count` groups of roughly equal length in characters."""
    limit = sum(len(text) for _, text in pieces) / count
    groups: List[List[Tuple[int, str]]] = [[]]
    filled = 0
    for piece in pieces:
        if filled >= limit:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += len(piece[1])
    return groups
