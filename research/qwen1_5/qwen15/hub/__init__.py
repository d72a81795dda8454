"""Models by name: fetched from Hugging Face or ModelScope, and never used before they are whole."""
