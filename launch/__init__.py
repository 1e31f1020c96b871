"""The command `afa`, and `afa doctor`, which checks whether a run can start on this machine."""
