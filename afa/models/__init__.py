"""Networks as linen modules: backbones, pooling heads, the embedder that composes them, generator,
discriminator, and fusion."""
