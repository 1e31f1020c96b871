"""Images in, batches out: data sets and their splits, corruptions, augmentation, the pipeline."""
