"""Which files of a model are needed, which are missing, and whether they are what the hub says they are."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from typing import Collection, List, Optional

from ..errors import EXIT_FAILED, UserError
from ..json_file import read_json
from ..machine import cache_folder
from ..progress import byte_bar

_SETTINGS = re.compile(r"[^/]+\.(json|jinja)|merges\.txt")
_RANK = re.compile(r"rank_\d+/[^/]+")
_WEIGHTS = (re.compile(r"(?!consolidated)[^/]+\.safetensors"), re.compile(r"pytorch_model[^/]*\.bin"),
            re.compile(r"[^/]+\.ckpt"))
"""Weights in the order of preference: one kind is taken."""
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_CHUNK_BYTES = 1 << 22


def needed(names: Collection[str]) -> List[str]:
    """Of the files of a repository those that a model is loaded from: settings, tokenizer, weights in one format."""
    wanted = [name for name in names if _SETTINGS.fullmatch(name) or _RANK.fullmatch(name)]
    for pattern in _WEIGHTS:
        weights = [name for name in names if pattern.fullmatch(name)]
        if weights:
            wanted += weights
            break
    return sorted(wanted)


def absent(folder: str) -> Optional[str]:
    """A file that a whole model in `folder` would have, None when nothing is missing.

    Raises:
        UserError: an index of shards is damaged.
    """
    present = _files(folder)
    if "config.json" not in present:
        return "config.json"
    if any(_RANK.fullmatch(name) for name in present):
        return None
    for index in _INDEXES:
        if index in present:
            found = read_json(os.path.join(folder, index))
            parts = found.get("weight_map") if isinstance(found, dict) else None
            if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
                raise UserError("has no weight_map that names files", os.path.join(folder, index),
                                "It is damaged, or not a checkpoint's index.")
            return min(set(parts.values()) - present, default=None)
    if any(pattern.fullmatch(name) for pattern in _WEIGHTS for name in present):
        return None
    return "model.safetensors"


def _files(folder: str) -> set:
    return {os.path.relpath(os.path.join(place, name), folder) for place, _, names in os.walk(folder) for name in names
            if os.path.exists(os.path.join(place, name))}


def verify(folder: str, repo: str) -> None:
    """Compare files of a cache that keeps contents under their own digest (as huggingface_hub does) with that digest.

    A file is read once: what has been found right is noted in the user's cache folder, and read again only when it has
    changed.

    Raises:
        UserError: a file is not what its digest says.
    """
    marks = cache_folder("verified")
    os.makedirs(marks, exist_ok=True)
    for name in sorted(_files(folder)):
        path = os.path.realpath(os.path.join(folder, name))
        digest = os.path.basename(path)
        if not _DIGEST.fullmatch(digest):
            continue
        stat = os.stat(path)
        state = f"{stat.st_size} {stat.st_mtime_ns}"
        with open(os.path.join(marks, digest), "a+", encoding="ascii") as mark:
            fcntl.flock(mark, fcntl.LOCK_EX)  # the other ranks wait and find it done
            mark.seek(0)
            if mark.read() == state:
                continue
            found = _digest(path, len(digest), stat.st_size, name)
            if found != digest:
                raise UserError(f"is damaged: its digest is {found}, the hub says {digest}", path,
                                f"Remove it and run again: {repo} is then fetched anew.", EXIT_FAILED)
            mark.truncate(0)
            mark.write(state)


def _digest(path: str, digits: int, nbytes: int, label: str) -> str:
    """SHA-256 of a large file; of a small one git's SHA-1, which counts its length in (git-hash-object(1))."""
    made = hashlib.sha256() if digits == 64 else hashlib.sha1(f"blob {nbytes}\0".encode())
    with open(path, "rb") as file, byte_bar(f"verifying {label}", nbytes) as bar:
        while chunk := file.read(_CHUNK_BYTES):
            made.update(chunk)
            bar.update(len(chunk))
    return made.hexdigest()
