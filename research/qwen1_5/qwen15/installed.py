"""Which packages are installed, found out without importing them."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from typing import Optional


def version_of(package: str) -> Optional[str]:
    """The installed version of a package, None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def folder_of(package: str) -> Optional[str]:
    """Where the module of this name lies, None when it is not installed."""
    spec = importlib.util.find_spec(package)
    return next(iter(spec.submodule_search_locations or ()), None) if spec is not None else None
