"""Packages for a service without training code."""
