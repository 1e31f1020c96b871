"""The networks: backbones, pooling heads, generator, discriminator, fusion, and the embedder that
composes them. Pure linen modules: `module.apply(variables, x)`."""
