"""Text to token ids and back: byte pairs, chat templates, the stream of an answer. Knows no model and no checkpoint."""
