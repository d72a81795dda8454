"""Measure prefill, decode, kernels, conversion and the tokenizer: `python -m qwen15.bench WHAT`."""

from .command import main

__all__ = ["main"]
