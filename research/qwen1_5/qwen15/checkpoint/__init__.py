"""Checkpoint files: what a stored tensor is, the formats, reading and writing whole files. Knows no network."""
