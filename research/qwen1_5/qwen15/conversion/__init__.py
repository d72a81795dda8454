"""Checkpoints into checkpoints: planned and accounted for first, then run, compared, and put in place."""
