"""Getting a run onto a machine: `python -m launch.doctor` tells whether one is fit for it."""
