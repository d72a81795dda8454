"""Measure speed, memory and closeness to transformers: `python -m qwen15 bench WHAT`."""
