"""Exact and approximate search over embeddings, their export to disk, and re-ranking."""
