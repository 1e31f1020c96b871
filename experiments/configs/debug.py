"""Runs every part in under a minute, for developers; its metrics are meaningless.

Command: python -m experiments.run --exp=debug
"""

from afa.config import ExperimentConfig, with_changes


def config(laptop: bool) -> ExperimentConfig:
    """Same at both scales."""
    return with_changes(
        ExperimentConfig(),
        **{
            "backbone.name": "resnet18",
            "data.objects": 24,
            "data.views": 6,
            "data.render_size": 48,
            "data.image_size": 32,
            "data.batch_size": 8,
            "data.images_per_class": 2,
            "embedder.embedding_dim": 32,
            "embedder.local_dim": 16,
            "generator.width": 4,
            "generator.levels": 2,
            "generator.blocks": 1,
            "discriminator.width": 4,
            "discriminator.levels": 2,
            "train.steps": "8",
            "train.generator_steps": "4",
            "train.log_every": "2",
            "train.evaluate_every": "4",
            "train.checkpoint_every": "4",
            "evaluation.batch_size": 16,
            "evaluation.views": ("flip",),
            "evaluation.severities": (3,),
            "evaluation.corruption_queries": 8,
        },
    )


def sweep() -> dict[str, tuple]:
    """Two losses, two learning rates."""
    return {"loss.name": ("norm_softmax", "arcface"), "optim.learning_rate": (1e-3, 3e-4)}
