"""Sweeps: many runs from one line, on this machine or a cluster, and the tables of their results."""
