"""Random checkpoints of any Qwen1.5 size, and how close our logits are to transformers': `python -m qwen15.bench WHAT`."""

from .command import main

__all__ = ["main"]
