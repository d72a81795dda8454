"""One checked configuration, every key with the place it came from."""
