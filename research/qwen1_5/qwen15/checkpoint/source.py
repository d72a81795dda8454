"""Open whatever weights come in: a Hugging Face folder, a file of weights, or a GGUF file."""

from __future__ import annotations

import os
from typing import Union

from ..errors import UserError
from .gguf_file import open_gguf
from .reader import Checkpoint, open_checkpoint


def is_gguf(path: Union[str, os.PathLike[str]]) -> bool:
    """Whether a path names a GGUF file."""
    return os.fspath(path).endswith(".gguf")


def open_source(path: Union[str, os.PathLike[str]], floats: str = "BF16") -> Checkpoint:
    """Open a checkpoint: as `open_checkpoint`, or a .gguf file.

    Args:
        path: a file or folder.
        floats: of a GGUF file, what matrices become whose blocks are not kept as they are.

    Raises:
        UserError: missing, damaged, ambiguous or incomplete.
    """
    if not is_gguf(path):
        return open_checkpoint(path)
    if not os.path.isfile(path):
        raise UserError("no such file", os.fspath(path))
    return open_gguf(os.fspath(path), floats)
