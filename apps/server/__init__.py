"""The HTTP server: bundles behind the interface that OpenAI's clients speak."""
