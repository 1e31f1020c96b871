"""Losses: pure functions of arrays, the formula above each."""
