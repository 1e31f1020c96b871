"""The command `afa`, and `afa doctor`, which tells whether a machine is fit for a run."""
