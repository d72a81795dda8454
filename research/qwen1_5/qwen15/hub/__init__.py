"""Models by name: found on Hugging Face or ModelScope, fetched into their caches, and never used before they are whole."""
