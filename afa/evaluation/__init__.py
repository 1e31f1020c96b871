"""How good a ranking is: `metrics` turns the ranks of the positives into figures."""
