"""Sweeps: many runs from one line, on this machine or on a cluster."""
