"""What a checkpoint says about itself: the config.json, generation_config.json and tokenizer files beside it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, List, Mapping, Optional, Tuple

from ..errors import UserError
from ..json_file import read_json
from .hf_config import CONFIG_FILE, HfConfig, dims_from_hf_config
from .keys import KEYS, MODEL, convert

_GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint's own settings; without a checkpoint all of them say nothing.

    Attributes:
        folders: where they may lie, nearest first.
        hf: its config.json, None when there is none.
        generation, generation_path: its generation_config.json, empty when there is none.
    """

    folders: Tuple[str, ...] = ()
    hf: Optional[HfConfig] = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    generation_path: str = ""

    def from_config(self, name: str) -> Tuple[Any, str]:
        """A field of `HfConfig` with the file it was read from; None when there is no config.json."""
        return (getattr(self.hf, name), self.hf.where) if self.hf is not None else (None, "")

    def from_generation(self, name: str) -> Tuple[Any, str]:
        """A setting of generation_config.json with its file, checked like one of the YAML.

        Raises:
            UserError: it is out of bounds or of a wrong type.
        """
        try:
            return convert(KEYS[MODEL + name], self.generation.get(name)), self.generation_path
        except ValueError as error:
            raise UserError(f"{name} {error}", self.generation_path) from None

    def find(self, name: str) -> Optional[str]:
        """The path of a file beside the checkpoint, None when there is none."""
        for folder in self.folders:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                return path
        return None


def read_beside(checkpoint: Optional[str]) -> CheckpointFiles:
    """Read what lies beside a checkpoint.

    Raises:
        UserError: a file is damaged, or says something that this network cannot do.
    """
    if not checkpoint:
        return CheckpointFiles()
    bare = CheckpointFiles(tuple(checkpoint_folders(checkpoint)))
    config_path, generation_path = bare.find(CONFIG_FILE), bare.find(_GENERATION_FILE)
    hf = dims_from_hf_config(config_path) if config_path else None
    generation = read_json(generation_path) if generation_path else {}
    if not isinstance(generation, dict):
        raise UserError("is not an object of settings", generation_path, "Download the file again.")
    return CheckpointFiles(bare.folders, hf, generation, generation_path or "")


def checkpoint_folders(path: str) -> List[str]:
    """Folders in which a checkpoint's own config.json, vocab.json and merges.txt may lie, nearest first.

    The checkpoint is a file, a folder, a folder with rank_0, or one of those rank folders.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    folders = [folder]
    if os.path.isdir(os.path.join(folder, "rank_0")):
        folders.append(os.path.join(folder, "rank_0"))
    if os.path.basename(os.path.abspath(folder)).startswith("rank_"):
        folders.append(os.path.dirname(os.path.abspath(folder)))
    return folders
