"""Measure speed, memory and closeness to transformers: `python -m qwen15 bench WHAT`."""

from __future__ import annotations

from .command import main

__all__ = ["main"]
