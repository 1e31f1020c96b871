"""From embeddings to answers: `exact` search, `export` to disk, `index` for fast search."""
