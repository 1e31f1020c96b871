"""Metrics that monitor the embedding and the adversarial training; part of every log line."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from afa import parallel
from afa.losses.adversarial import psnr
from afa.models import layers
from afa.models.fusion import fuse
from afa.models.networks import Networks
from afa.models.spaces import IMAGES

SNAPSHOT_ROWS = 32  # images G(z) per device, to measure how much they vary over z


def batch_recall(rows: Float[Array, "n d"], labels: Int[Array, "n"]) -> Float[Array, ""]:
    """R@1 within the batch, over the rows with at least one positive in the batch.

    0 if there are no such rows.
    """
    similarity = rows @ rows.T - 4 * jnp.eye(len(rows))
    correct = labels[jnp.argmax(similarity, axis=1)] == labels
    has_positive = jnp.sum(labels[:, None] == labels[None, :], axis=1) > 1
    return jnp.sum(correct & has_positive) / jnp.maximum(jnp.sum(has_positive), 1)


def embedding(rows: Float[Array, "n d"], labels: Int[Array, "n"]) -> dict[str, Array]:
    """R@1 within the batch, and the mean cosine of all pairs (1: the embedding has collapsed)."""
    n = len(rows)
    total = jnp.sum(jnp.square(jnp.sum(rows, axis=0)))
    return {"batch_recall": batch_recall(rows, labels), "mean_cosine": (total - n) / (n * (n - 1))}


def restoration(
    x: Float[Array, "b h w c"],
    restored: Float[Array, "b h w c"],
    clean: Float[Array, "b h w c"],
    corruption: Int[Array, "b"],
    kinds: int,
) -> dict[str, Array]:
    """Sums and counts of the PSNR before and after restoration, per kind: 0 for clean images,
    then the trained corruptions in order. The peak is 1: images, or normalised mid maps."""

    def by_kind(values: Float[Array, "b"]) -> Float[Array, "kinds"]:
        return jax.ops.segment_sum(values, corruption, kinds)

    return parallel.pmean(
        {
            "psnr_in": by_kind(psnr(x, clean)),
            "psnr_out": by_kind(psnr(restored, clean)),
            "psnr_count": by_kind(jnp.ones(len(clean))),
        }
    )


def snapshot(
    networks: Networks,
    state: Any,
    frozen: PyTree,
    images: Float[Array, "b h w 3"],
    label: Int[Array, "b"],
    key: Key[Array, ""],
) -> dict[str, Array]:
    """R@1 within the batch of x, x^ and both fused, and the standard deviation of G(z) over z (0:
    mode collapse) and of x, in the space of G. Uses the moving average of G, as in search."""
    assert networks.generator is not None
    variables = state.search_variables() | {"embedder": frozen}
    z = jax.random.normal(key, (SNAPSHOT_ROWS, networks.latent_dim))
    sampled = layers.apply(networks.generator, variables["generator"], z, method="sample")

    def spread(samples: Float[Array, "b h w c"]) -> Float[Array, ""]:
        return jnp.sqrt(jnp.mean(jnp.var(samples, axis=0)))

    restored = networks.restore(variables, images)
    blocks = {
        name: space.describe(networks.embedder, frozen, each, train=False).global_descriptor
        for name, space, each in (("x", IMAGES, images), ("restored", networks.space, restored))
    }
    blocks["fused"] = fuse(blocks, {"x": 1.0, "restored": 1.0})
    rows, labels = parallel.all_gather((blocks, label))
    x = networks.space.of(networks.embedder, frozen, images)
    figures = {f"recall_{name}": batch_recall(each, labels) for name, each in rows.items()}
    figures |= {"spread_samples": spread(sampled), "spread_images": spread(x)}
    return parallel.pmean(figures)


# Losses and gradient norms in order of computation (a compiled step returns its metrics in
# alphabetical order).
CHECKED = (
    "metric_loss",
    "adversarial_metric_loss",
    "generated_metric_loss",
    "embedder_gradient_norm",
    "loss_gradient_norm",
    "discriminator_loss",
    "r1",
    "discriminator_gradient_norm",
    "generator_loss",
    "generator_gradient_norm",
)


def first_not_finite(metrics: Mapping[str, Any]) -> str | None:
    """Returns the first loss or gradient norm that is not finite, or None."""
    for name in CHECKED:
        if name in metrics and not np.isfinite(metrics[name]):
            return name
    return None


def first_part_not_finite(state: Any) -> str | None:
    """Returns the path of the first parameter, batch statistic, average or loss memory that is not
    finite, or None. A checkpoint of such a state is useless even if all losses were finite."""
    parts = ("variables", "average", "loss_memory")
    trees = parallel.to_host({name: getattr(state, name) for name in parts})
    for path, leaf in jax.tree.leaves_with_path(trees):
        if not np.isfinite(leaf).all():
            return "/".join(str(part.key) for part in path)
    return None


def psnr_change(name: str, before: float, after: float) -> str:
    """Formats the PSNR of a corruption before and after G; two digits, as small losses count."""
    return f"{name} {before:.2f} -> {after:.2f} dB"


def worsened(line: Mapping[str, float], corruptions: Sequence[str], ends: bool) -> str | None:
    """Returns a warning that G lowers the PSNR (dB); None if it does not.

    Few images per corruption are behind one log line, so before the end of a stage only the mean
    over the corruptions counts; at the end the warning lists the corruptions that get worse.
    """
    changes = {name: (line[f"psnr_in/{name}"], line[f"psnr_out/{name}"])
               for name in corruptions if f"psnr_in/{name}" in line}  # fmt: skip
    if not changes:
        return None
    if not ends:
        mean = float(np.mean([after - before for before, after in changes.values()]))
        return f"G makes its input worse: mean {mean:+.2f} dB" if mean < 0 else None
    worse = [psnr_change(name, before, after)
             for name, (before, after) in changes.items() if after < before]  # fmt: skip
    return f"G makes its input worse: {', '.join(worse)}" if worse else None


def summarise(steps: Sequence[Mapping[str, Any]], corruptions: Sequence[str]) -> dict[str, float]:
    """Returns a log line: means of the metrics of its steps, and PSNR by corruption."""
    names = ("clean", *corruptions)
    line: dict[str, float] = {}
    for name in steps[-1]:
        values = np.asarray([step[name] for step in steps if name in step], np.float64)
        if name in ("psnr_in", "psnr_out"):
            counts = np.sum([step["psnr_count"] for step in steps if name in step], axis=0)
            for i, kind in enumerate(names):
                if counts[i] > 0:
                    line[f"{name}/{kind}"] = float(values[:, i].sum() / counts[i])
        elif name != "psnr_count":
            line[name] = float(values.mean())
    return line
