"""Packages of a trained run for services without training code."""
