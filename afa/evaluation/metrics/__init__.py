"""Metrics in plain NumPy, checked against reference values."""
