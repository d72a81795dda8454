"""What is a model's name on a hub, and what is a path: `Qwen/Qwen1.5-0.5B-Chat@main`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Optional

HUBS = ("hf", "modelscope")
"""Hugging Face (or what HF_ENDPOINT names) and ModelScope."""
_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[\w./-]{{1,200}}))?", re.ASCII)
_FILES = (".ckpt", ".safetensors", ".bin", ".json", ".yaml", ".yml")


@dataclass(frozen=True)
class HubName:
    """A model on a hub.

    Attributes:
        repo: `OWNER/NAME`.
        revision: branch, tag or commit; None for the hub's default branch.
    """

    repo: str
    revision: Optional[str] = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def parse(text: str) -> Optional[HubName]:
    """The hub name that `text` is; None when it is a path.

    What exists on this machine is a path, always. So is what cannot be a name: `./x`, `/x`, `a/b/c`,
    `models/x.safetensors`.
    """
    if os.path.exists(os.path.expanduser(text)) or text.endswith(_FILES):
        return None
    found = _NAME.fullmatch(text)
    return HubName(found["repo"], found["revision"]) if found else None
