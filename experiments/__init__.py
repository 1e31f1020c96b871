"""The commands: `python -m experiments.run`, `experiments.search`, ... Experiments: `configs`."""
