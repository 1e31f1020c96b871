"""Data sets and their splits, image decoding, corruptions, augmentation, and the input pipeline."""
