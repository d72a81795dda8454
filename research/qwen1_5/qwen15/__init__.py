"""Qwen1.5 on MindSpore: convert checkpoints, slice them, and generate text on a CPU or on Ascend cards."""

from __future__ import annotations

TYPE_CHECKING = False  # as typing has it: the module takes a third of the time until a command can hold Ctrl-C back

if TYPE_CHECKING:
    from typing import Any

    from .api import Conversion, Generation, Model, UserError, convert, generate, load

__all__ = ["Conversion", "Generation", "Model", "UserError", "convert", "generate", "load"]


def __getattr__(name: str) -> Any:
    # The interface is loaded when it is first used: every command imports this package, and most need none of it.
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
