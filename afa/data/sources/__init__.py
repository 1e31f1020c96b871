"""Data sets: one file a source; `registry` is the table of those that can be trained on.

What public benchmarks are evaluated by stands in `afa.evaluation.benchmarks`.
"""
