"""An OpenAI-compatible server: one engine in the main thread, the web in a second one, a desk between them."""
