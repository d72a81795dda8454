"""Qwen2Tokenizer for programs and YAML files: `from qwen1_5_tokenizer import Qwen2Tokenizer`.

Without MindFormers in the process it is the plain tokenizer (`qwen15.text.tokenizer`), and nothing heavy is imported.
After `import mindformers` it is the same one as a MindFormers `PreTrainedTokenizer`
(`qwen15.text.mindformers_tokenizer`), which `type: Qwen2Tokenizer` in a YAML builds. MindFormers finds it by
`auto_register: qwen1_5_tokenizer.Qwen2Tokenizer` when REGISTER_PATH names this folder, or because this module was
imported, before MindFormers or after it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

_FOLDER = os.path.dirname(os.path.abspath(__file__))
# MindFormers' auto_register runs a copy of this one file from its cache; the package is where REGISTER_PATH points.
if importlib.util.find_spec("qwen15") is None:
    sys.path.append(os.environ.get("REGISTER_PATH") or _FOLDER)
try:
    import qwen15.text.tokenizer  # inside `try`: MindFormers refuses all others that it cannot find by itself
except ImportError as missing:
    raise ImportError("qwen1_5_tokenizer needs the package qwen15 from its own folder: put research/qwen1_5 on "
                      "PYTHONPATH") from missing
if TYPE_CHECKING:
    Qwen2Tokenizer = qwen15.text.tokenizer.Qwen2Tokenizer

__all__ = ["Qwen2Tokenizer"]


def __getattr__(name: str) -> Any:
    if name != "Qwen2Tokenizer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _mindformers_is_imported():
        return qwen15.text.tokenizer.Qwen2Tokenizer
    return _registered()


def _registered() -> type:
    """The tokenizer for MindFormers, which registers itself when it is imported."""
    return importlib.import_module("qwen15.text.mindformers_tokenizer").Qwen2Tokenizer


def _mindformers_is_imported() -> bool:
    module = sys.modules.get("mindformers")
    return module is not None and not getattr(module.__spec__, "_initializing", False)


class _AfterMindFormers(importlib.abc.MetaPathFinder):
    """Registers the tokenizer right after MindFormers' own import, for programs that import this module first."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Finds nothing itself: has the others find `mindformers` and adds the registration to its loading."""
        if name != "mindformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                _registered()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


# The YAML files say `auto_register` for those who import nothing; MindFormers then wants to know the folder from
# everybody.
os.environ.setdefault("REGISTER_PATH", _FOLDER)
if _mindformers_is_imported():
    _registered()
elif not any(type(finder).__name__ == "_AfterMindFormers" for finder in sys.meta_path):
    sys.meta_path.insert(0, _AfterMindFormers())
