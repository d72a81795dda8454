"""Measure speed, memory and closeness to transformers: `python -m qwen15 bench WHAT`."""

from .command import main

__all__ = ["main"]
