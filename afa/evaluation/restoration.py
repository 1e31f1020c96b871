"""Measures the restoration by G: PSNR in dB to the clean image before and after, by corruption."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from afa.config import ExperimentConfig
from afa.data.corruptions import CORRUPTIONS
from afa.data.pipeline import Corruption
from afa.data.types import ImageSet
from afa.evaluation.protocols import drawn_evenly
from afa.inference.embed import Embedding
from afa.losses.adversarial import psnr
from afa.train.health import psnr_change

SEVERITY = 3
IMAGES = 200  # at most; the standard error of the mean is then about 0.2 dB
Restored = dict[str, dict[str, float]]


def measure(
    embedding: Embedding, variables: PyTree, images: ImageSet, config: ExperimentConfig
) -> Restored:
    """Measures the mean PSNR to the clean image (or mid map) for every corruption at severity 3.

    Args:
      embedding: predict functions of the run.
      variables: variables of its networks.
      images: the test split.
      config: configuration of the run.

    Returns:
      Corruption, or "clean" -> "psnr_in" (dB before G; the upper bound of 60 for "clean") and
      "psnr_out" (dB after G). Empty for a run without G.
    """
    if embedding.networks.generator is None:
        return {}
    wild = np.flatnonzero(~images.catalogue)
    count = min(config.evaluation.corruption_queries or IMAGES, IMAGES)
    drawn = images.subset(drawn_evenly(images, wild, count, seed=0))
    normalised = embedding.networks.space.normalised
    clean: Float[Array, "n h w c"] | None = None
    found: Restored = {}
    kinds: list[tuple[str, Corruption | None]] = [("clean", None)]
    kinds += [(name, (name, SEVERITY)) for name in CORRUPTIONS]
    for name, corruption in kinds:
        before, after = embedding.restored(variables, drawn, corruption)
        clean = jnp.asarray(before) if clean is None else clean
        target = normalised(clean, clean)
        found[name] = {
            key: float(np.mean(psnr(normalised(jnp.asarray(each), clean), target)))
            for key, each in (("psnr_in", before), ("psnr_out", after))
        }
    return found


def warnings(found: Mapping[str, Mapping[str, float]], trained: Sequence[str]) -> list[str]:
    """Returns sentences about the corruptions under which G lowers the PSNR; [] if there are none.

    Args:
      found: from `measure`.
      trained: trained corruptions.
    """
    worse = [name for name, each in found.items()
             if name != "clean" and each["psnr_out"] < each["psnr_in"]]  # fmt: skip
    lines = []
    for names, group in (
        ([n for n in worse if n in trained], "that it was trained on"),
        ([n for n in worse if n not in trained], "that were held back"),
    ):
        if names:
            listed = ", ".join(
                psnr_change(n, found[n]["psnr_in"], found[n]["psnr_out"]) for n in names
            )
            lines.append(f"G makes its input worse under corruptions {group}: {listed}")
    return lines
