"""Import MindFormers, whose version 2.0 asks for a package that only its training uses and that PyPI does not have.

`mindformers.pynative`, the part that trains in PyNative mode, imports `hyper_parallel`, and `import mindformers`
imports that part. Where hyper_parallel is not installed, names stand for it that can be imported and not be used:
prediction uses none of them. Where it is installed nothing is changed.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any, Optional

from ..errors import EXIT_FAILED, UserError
from ..installed import version_of

PACKAGE = "hyper_parallel"
_STOOD_FOR = (PACKAGE, "mindformers.pynative")


def import_mindformers() -> Any:
    """The module `mindformers`.

    Raises:
        UserError: it is not installed, or cannot be imported.
    """
    if "mindformers" not in sys.modules and _wants_what_is_not_there():
        sys.meta_path.insert(0, _Finder())
    try:
        import mindformers
    except ImportError as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = "Install the version that goes with this MindSpore: `qwen15 doctor` names it."
        if (version_of("mindformers") or "").startswith("2.1."):
            fix = "MindFormers 2.1 wants MindSpore 2.11, which is not out yet: pip install --no-deps mindformers==2.0.0"
        raise UserError(f"MindFormers cannot be imported: {first}", exit_code=EXIT_FAILED, fix=fix) from error
    return mindformers


def _wants_what_is_not_there() -> bool:
    if PACKAGE in sys.modules or importlib.util.find_spec(PACKAGE) is not None:
        return False
    return (version_of("mindformers") or "").startswith("2.")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules that are stood for, below every name in `_STOOD_FOR`."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None
                  ) -> Optional[importlib.machinery.ModuleSpec]:
        if any(fullname == name or fullname.startswith(f"{name}.") for name in _STOOD_FOR):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing in it."""


class _StandIn(ModuleType):
    """A module whose every name can be had: classes to inherit from or to name, of which no object can be made, and
    functions that give a decorator without effect."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _class(self.__name__, name) if name[:1].isupper() else _register
        setattr(self, name, made)
        return made


def _register(*arguments: Any, **named: Any) -> Any:
    """What is registered with PyNative training at import, by `@register_...(...)`, stays as it is."""
    return lambda registered: registered


def _class(module: str, name: str) -> type:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise UserError(f"{module}.{name}, of MindFormers' PyNative training, needs the package hyper-parallel, which "
                        "is not installed", exit_code=EXIT_FAILED,
                        fix="Prediction does without; for training see MindSpore's site.")

    return type(name, (), {"__init__": refuse, "__module__": module})
