"""Preparing a machine for a run: `python -m launch.doctor` checks it."""
