"""Public retrieval sets as they are distributed: lists and ground truth beside the pictures.

One file a set reads its lists; those that can be trained on also build the three splits, and stand
in the table of `afa.data.sets`. What they are evaluated by stands in `afa.evaluation.benchmarks`.
"""
