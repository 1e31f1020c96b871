"""Data sets: one file per source; `registry` lists those that can be trained on.

The evaluation protocols of public benchmarks are in `afa.evaluation.benchmarks`.
"""
