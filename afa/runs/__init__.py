"""Runs: from images to report, and the comparison of finished runs."""
