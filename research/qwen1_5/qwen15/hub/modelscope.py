"""A model from ModelScope, by the package modelscope: its cache, token and address are the ones that users know.

MODELSCOPE_CACHE, MODELSCOPE_API_TOKEN and MODELSCOPE_ENDPOINT (MODELSCOPE_DOMAIN before version 1.38) are read by
modelscope itself, which compares digests while it downloads. HF_HUB_OFFLINE keeps this from asking the hub, too.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Callable, List

from ..errors import EXIT_FAILED, UserError
from . import files
from .names import HubName

_SETTINGS = ["*.json", "*.jinja", "merges.txt", "rank_*/*"]
_WEIGHTS = (["*.safetensors"], ["pytorch_model*.bin"], ["*.ckpt"])


def fetch(name: HubName, tell: Callable[[str], None]) -> str:
    """The folder of a model in modelscope's cache; what is missing there is downloaded.

    Raises:
        UserError: modelscope is not installed, or the model cannot be had whole.
    """
    try:
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError:
        raise UserError("the Python package modelscope is not installed", "--hub modelscope",
                        "Run: pip install modelscope") from None

    def get(patterns: List[str]) -> str:
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        with contextlib.redirect_stdout(sys.stderr):  # modelscope prints to stdout, which is for the answer
            return snapshot_download(name.repo, revision=name.revision, allow_patterns=patterns,
                                     local_files_only=offline)

    tell(f"{name}: from ModelScope")
    try:
        for weights in _WEIGHTS:
            folder = get(_SETTINGS + weights)
            missing = files.absent(folder)
            if missing is None:
                return folder
    except Exception as error:  # modelscope raises many types without a common base
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise UserError(f"cannot be fetched from ModelScope ({reason})", name,
                        "Check the name and the network; a private model needs MODELSCOPE_API_TOKEN.",
                        EXIT_FAILED) from None
    raise UserError(f"is not whole: {missing} is missing", name, "Run again with the network to get the rest.",
                    EXIT_FAILED)
