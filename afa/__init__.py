"""AFA-SVR: adversarial feature augmented single-view image retrieval, in JAX."""

__version__ = "0.1.0"
