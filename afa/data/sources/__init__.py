"""Public retrieval sets as they are distributed: lists and ground truth beside the images.

One file a set reads its lists; those that can be trained on also build the three splits, and stand
in the table of `afa.data.sources.registry`. What they are evaluated by stands in `afa.evaluation.benchmarks`.
"""
