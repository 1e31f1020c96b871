"""Benchmarks of speed against other libraries."""
