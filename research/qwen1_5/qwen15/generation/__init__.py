"""Token ids to token ids: engine, KV cache blocks, sampling; and the session that puts text around them."""
