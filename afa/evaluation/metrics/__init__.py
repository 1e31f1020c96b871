"""Retrieval, verification and clustering metrics in plain NumPy."""
