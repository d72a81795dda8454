"""Vocabulary, merges and added tokens out of a tokenizer.json: transformers 5 writes no other file with them."""

from __future__ import annotations

import functools
import os
from typing import Any, Dict, List, Mapping, NamedTuple, Tuple

from ..errors import UserError
from ..json_file import read_json

FILE_NAME = "tokenizer.json"
PIECES = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
"""Qwen2's way of cutting text into pieces: contractions, words with one leading mark, single digits, runs of symbols,
line ends, other white space (the last blank stays with the next word)."""

_MOST_BYTES = 64 * 2 ** 20  # of a file; Qwen's have 7 MB
_FIX = "vocab.json and merges.txt of the same model, put beside it, are used instead."
_STEPS: Dict[str, Any] = {
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]},
    "model": {"type": "BPE", "dropout": None, "byte_fallback": False, "ignore_merges": False,
              "continuing_subword_prefix": None, "end_of_word_suffix": None},
}
"""What Qwen2's tokenizer does, as far as it decides the ids of a text."""


class TokenizerJson(NamedTuple):
    """What is in the file.

    Attributes:
        vocab: token in the byte alphabet to id; not checked.
        merges: left and right part of each, most wanted first.
        added: as `added_tokens_decoder` in tokenizer_config.json: id to the token's content and flags.
    """

    vocab: Any
    merges: Tuple[Tuple[str, str], ...]
    added: Dict[str, Any]


def is_one(path: str) -> bool:
    """Whether a path is that of a tokenizer.json, by its name."""
    return os.path.basename(path) == FILE_NAME


def read(path: str) -> TokenizerJson:
    """The file's contents; a file that stays as it is is read once.

    Raises:
        UserError: it cannot be read, or says something that Qwen2's tokenizer does not do.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", path) from None
    return _read(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)
def _read(path: str, mtime_ns: int, nbytes: int) -> TokenizerJson:
    found = read_json(path, _MOST_BYTES)
    model = found.get("model") if isinstance(found, dict) else None
    if not isinstance(model, dict):
        raise UserError("has no model, so it is no tokenizer.json", path, "Fetch it again.")
    for name, expected in _STEPS.items():
        other = _difference(found.get(name), expected, name)
        if other:
            raise UserError(f"is not the tokenizer of a Qwen2 model: {other}", path, _FIX)
    added = found.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) and type(token.get("id")) is int
                                              for token in added):
        raise UserError("added_tokens is not a list of tokens with their ids", path, _FIX)
    return TokenizerJson(model.get("vocab"), _merges(model.get("merges"), path),
                         {str(token["id"]): token for token in added})


def _difference(found: Any, expected: Any, name: str) -> str:
    """The first key whose value is another one; empty when there is none. Nothing and "" mean the same."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        return next(filter(None, (_difference(found.get(key), value, f"{name}.{key}")
                                  for key, value in expected.items())), "")
    if isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        return next(filter(None, (_difference(one, value, f"{name}[{number}]")
                                  for number, (one, value) in enumerate(zip(found, expected)))), "")
    same = found == expected or (expected in (None, False) and found in (None, False, ""))
    return "" if same else f"{name} is {str(found)[:60]!r}"


def _merges(found: Any, path: str) -> Tuple[Tuple[str, str], ...]:
    """Pairs; older files write `left right` as one text."""
    pairs: List[Tuple[str, str]] = []
    for number, merge in enumerate(found if isinstance(found, list) else (), 1):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise UserError(f"merge {number} is {str(merge)[:60]!r}, not two tokens", path, _FIX)
        pairs.append((parts[0], parts[1]))
    return tuple(pairs)
