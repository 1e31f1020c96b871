"""The commands: `python -m experiments.run`, `experiments.search`, ... Recipes lie in `configs`."""
