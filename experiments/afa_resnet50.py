"""AFA-SVR with a ResNet-50 on the embedded objects: the main job.

Command: python -m experiments.run --exp=afa_resnet50
Laptop scale, two cores of an AMD EPYC (Milan, AVX2), 2026-11-25, one seed: 593 s without export and
report. On VALIDATION classes, by which the schedule was chosen, so these figures are optimistic:
fused, leave-one-out, R@1 51.0 %, MAP@R 18.3 % (raw pixels 28.5 / 5.9, untrained 18.0 / 3.7); on
corrupted queries seen 39.2 / 13.0, unseen 34.7 / 11.4 (raw pixels 27.1 / 5.1 and 28.6 / 6.0).
Full scale: not measured yet.
"""

from afa.config import ExperimentConfig, with_changes


def config(laptop: bool) -> ExperimentConfig:
    """Full scale: 224 px, 100 epochs. Laptop: 64 px, a few hundred steps, minutes on two cores."""
    full = with_changes(
        ExperimentConfig(),
        **{
            "backbone.name": "resnet50",
            "data.image_size": 224,
            "data.render_size": 256,
            "data.batch_size": 128,
            "train.steps": "100ep",
        },
    )
    return _laptop(full) if laptop else full


def fine_tuned(config: ExperimentConfig, weights: str) -> ExperimentConfig:
    """The same from published weights: new parts of F learn alone for an epoch, then the backbone
    with a tenth of their rate, its BatchNorm statistics as they were published."""
    return with_changes(
        config,
        **{
            "backbone.weights": weights,
            "backbone.frozen_norm": True,
            "optim.backbone_rate": 0.1,
            "optim.head_warmup": "1ep",
        },
    )


def _laptop(full: ExperimentConfig) -> ExperimentConfig:
    return with_changes(
        full,
        **{
            "data.image_size": 64,
            "data.render_size": 96,
            "data.batch_size": 32,
            "data.sampler": "shuffle",
            # Some five epochs: no picture is seen often enough to need strong changes.
            "data.corrupt_probability": 0.25,
            "data.crop_scale": 0.8,
            "data.jitter": 0.1,
            "loss.temperature": 0.1,
            "optim.learning_rate": 3e-3,
            "train.steps": "280",
            "train.plain": "180",
            "train.generator_steps": "40",
            "train.evaluate_every": "100%",
            "train.checkpoint_every": "25%",
            "train.keep_best": 1,
            "embedder.embedding_dim": 256,
            "embedder.standardise": True,
            "generator.width": 16,
            "discriminator.width": 16,
            "optim.ema_decay": 0.98,
            "evaluation.batch_size": 40,
            "evaluation.severities": (3,),
            "evaluation.corruption_queries": 80,
            "evaluation.views": ("flip", "median"),
        },
    )
