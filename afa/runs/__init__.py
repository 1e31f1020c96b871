"""One run from images to report, and what compares finished runs."""
