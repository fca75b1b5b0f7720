"""Memory against accuracy over weights, KV caches, chunks and contexts: what is tried, found, kept and drawn."""
