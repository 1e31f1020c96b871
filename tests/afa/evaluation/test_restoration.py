"""PSNR of images before and after G, and what is said when it falls."""

import jax.numpy as jnp
import numpy as np
import tiny_run
from arrays import near

from afa.config import with_changes
from afa.data.corruptions import CORRUPTIONS
from afa.data.types import ImageSet
from afa.evaluation import restoration
from afa.inference.embed import Embedding
from afa.losses.adversarial import psnr
from afa.models.networks import build_networks
from experiments import run as command


class Halfway(Embedding):
    """Corrupted images are 0.1 from the clean one; G halves that, or makes it worse by half."""

    def __init__(self, networks):
        self.networks, self.asked = networks, []

    def restored(self, variables, images, corruption=None):
        self.asked.append(corruption)
        clean = np.full((len(images), 4, 4, 3), 0.5, np.float32)
        if corruption is None:
            return clean, clean + 0.01
        sign = -1 if corruption[0] in ("jpeg", "occlusion") else 1
        return clean + 0.1, clean + 0.1 - sign * 0.05


def image_set(classes, count):
    """Black images of some classes, one of each for the catalogue."""
    labels = np.repeat(np.arange(classes), count)
    images = [np.zeros((8, 8, 3), np.uint8)] * len(labels)
    return ImageSet(images, labels, tuple(map(str, range(len(labels)))),
                    np.arange(len(labels)) % count == 0)  # fmt: skip


def config_of(**changes):
    return with_changes(command.parse(tiny_run.words("", "")), **changes)


def test_the_figures_are_mean_psnr_before_and_after():
    config = config_of()
    fake = Halfway(build_networks(config, 4))
    found = restoration.measure(fake, {}, image_set(8, 5), config)
    assert list(found) == ["clean", *CORRUPTIONS]
    assert fake.asked == [None, *((name, 3) for name in CORRUPTIONS)]
    near(found["clean"]["psnr_out"], 40, 1e-2)
    near(found["gaussian_noise"]["psnr_in"], 20, 1e-3)
    near(found["gaussian_noise"]["psnr_out"], -20 * np.log10(0.05), 1e-3)
    near(found["jpeg"]["psnr_out"], -20 * np.log10(0.15), 1e-3)
    assert psnr(jnp.zeros((1, 1, 1, 3)), jnp.full((1, 1, 1, 3), 0.1))[0] > 19.99
    said = restoration.warnings(found, config.data.corruptions)
    assert said == [
        "G makes its input worse under corruptions that it was trained on: "
        "occlusion 20.00 -> 16.48 dB",
        "G makes its input worse under corruptions that were held back: jpeg 20.00 -> 16.48 dB",
    ]
    better = {name: {"psnr_in": 20.0, "psnr_out": 20.0} for name in CORRUPTIONS}
    clean = {"clean": {"psnr_in": 60.0, "psnr_out": 36.0}}
    assert restoration.warnings(clean | better, config.data.corruptions) == []


def test_without_a_generator_there_is_nothing_to_measure():
    config = config_of(**{"adversarial.generator": False})
    made = Embedding(
        build_networks(config, 4), config.backbone.name, config.data, config.evaluation
    )
    assert restoration.measure(made, {}, image_set(3, 3), config) == {}
    assert restoration.warnings({}, config.data.corruptions) == []
