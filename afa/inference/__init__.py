"""Predict functions: images in, descriptors out."""
