"""Qwen1.5 on MindSpore: convert checkpoints, slice them, and generate text on a CPU or on Ascend cards."""
