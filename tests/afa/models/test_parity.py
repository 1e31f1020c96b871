"""Every backbone against the network it was published as: logits, mid map and gradients, with all
parameters filled by one rule (`support/rule.py`; `references/make.py` makes the references).

Nothing is jitted: a deep network takes a minute to compile and seconds to run operation by
operation.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rule
from paths import REFERENCES

from afa import runtime
from afa.config import BackboneConfig
from afa.models import backbones, pretrained
from afa.models.backbones.contract import IMAGENET, Options
from afa.models.pretrained import match, names

CASES = sorted(path.stem for path in REFERENCES.glob("*.npz"))
# Of each family the smallest, and of each library one; all others are `slow`.
QUICK = {
    "bn_inception", "densenet121", "efficientnet_lite0", "googlenet", "inception_v3",
    "mobilenet_v2", "resnet18", "resnet50", "resnet50.timm", "resnet50.transformers",
    "resnext50_32x4d", "squeezenet1_0", "vgg11", "vgg11_bn", "vit_s14", "vit_s14_reg.timm",
    "vit_s16",
}  # fmt: skip
GRADIENTS = {"resnet18", "vit_s14_reg"}  # backwards takes longer
HEADLESS = ("vit_s14_reg.timm",)


@pytest.fixture(autouse=True)
def forget():
    """One network at a time: otherwise the process grows to 5 GiB."""
    yield
    runtime.forget_programs()


def reference(case: str) -> dict[str, np.ndarray]:
    with np.load(REFERENCES / f"{case}.npz") as file:
        return dict(file)


def shapes_of(case: str) -> rule.Shapes:
    """Names and shapes of the arrays in the reference's own file of weights."""
    stored = reference(case)
    pairs = zip(stored["names"], stored["shapes"], strict=True)
    return {str(n): tuple(map(int, s.split())) for n, s in pairs}


def network(case: str, fill=rule.filled):
    """Our network with the reference's parameters: module, variables, report."""
    name = case.split(".")[0]
    found, library = names.translated(fill(shapes_of(case)), backbones.family(name))
    weights = pretrained.Pretrained(found, case, "", library, IMAGENET)
    head = "none" if case in HEADLESS else "imagenet"
    module = backbones.build(name, Options(classes=0 if case in HEADLESS else 1000))
    side = int(reference(case)["side"])
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, side, side, 3)), method=forward)
    )
    variables, report = pretrained.load_weights(shapes, weights, BackboneConfig(name, head=head))
    return module, variables, report


def forward(module, x):
    """Mid map, and logits, or of a network without them the class token."""
    mid = module.lower(x, False, "clean")
    last = module.upper(mid, False, "clean")
    return mid, module.logits(last) if module.options.classes else last[:, 0, 0]


def far(found, wanted) -> float:
    return float(np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max())


def quick(cases, names):
    """The cases, all but the named ones marked slow."""
    return [pytest.param(case, marks=[] if case in names else [pytest.mark.slow]) for case in cases]


@pytest.mark.parametrize("case", CASES)
def test_every_key_is_loaded(case):
    report = network(case, lambda shapes: {n: np.zeros(s, "f4") for n, s in shapes.items()})[2]
    assert not (report.missing or report.unexpected or report.mismatched or report.ignored)


@pytest.mark.parametrize("case", quick(CASES, QUICK))
def test_logits_and_mid_map(case):
    stored = reference(case)
    module, variables, _ = network(case)
    x = jnp.asarray(rule.images(int(stored["side"])))
    mid, logits = module.apply(variables, x, method=forward)
    assert far(rule.sample(np.asarray(mid)), stored["mid"]) < 1e-4
    assert far(logits, stored["logits"]) < 1e-4
    assert_same_order(np.asarray(logits), stored["logits"])


def assert_same_order(found, wanted):
    """The same ranking of classes wherever neighbours are further apart than rounding."""
    order = np.argsort(-wanted, axis=-1)
    apart = -np.diff(np.take_along_axis(wanted, order, -1)) > 2e-4 * np.abs(wanted).max()
    alone = np.pad(apart, ((0, 0), (1, 0)), constant_values=True)
    alone &= np.pad(apart, ((0, 0), (0, 1)), constant_values=True)
    assert alone[:, 0].all()
    np.testing.assert_array_equal(np.argsort(-found, axis=-1)[alone], order[alone])


@pytest.mark.parametrize("case", quick([case for case in CASES if "." not in case], GRADIENTS))
def test_gradients(case):
    stored = reference(case)
    module, variables, _ = network(case)
    weights = rule.direction("logits", stored["logits"].shape)

    def loss(params, x):
        _, logits = module.apply(variables | {"params": params}, x, method=forward)
        return jnp.sum(logits * weights)

    differentiate = jax.grad(loss, argnums=(0, 1))
    x = jnp.asarray(rule.images(int(stored["side"])))
    sums = summary(*differentiate(variables["params"], x))
    wanted = {"slope": stored["slope"]}
    for kind in ("norm", "dot"):
        pairs = zip(stored["gradient_names"], stored[f"gradient_{kind}s"], strict=True)
        wanted |= {f"{kind} of {name}": value for name, value in pairs}
    # Parameters of transformers have other names in the reference; the image gradient covers them.
    assert len(wanted.keys() & sums.keys()) == len(sums) or case.startswith(("vit_s14", "vit_b14"))
    far = distances(sums, wanted)
    if max(far.values()) < 1:
        return
    # Among a million activations, some ReLU inputs are within rounding of zero. So gradients are
    # only as exact as their spread between images that differ in the last bits.
    spread = dict.fromkeys(far, 0.0)
    for draw in ("first", "second", "third", "fourth"):
        near = x * (1 + 1e-6 * jnp.asarray(rule.direction(draw, x.shape)))
        moved = distances(summary(*differentiate(variables["params"], near)), sums)
        spread = {name: max(most, moved[name]) for name, most in spread.items()}
        failed = {name for name, each in far.items() if each > 1 + 2 * spread[name]}
        if not failed:
            return
    assert not failed


def summary(gradient, image_gradient) -> dict[str, Any]:
    """Norm and one projection of every gradient, and samples of the image gradient."""
    sums: dict[str, Any] = {"slope": rule.sample(np.asarray(image_gradient))}
    for name, each in match.export({"params": gradient}).items():
        sums[f"norm of {name}"] = np.linalg.norm(each)
        sums[f"dot of {name}"] = np.vdot(each, rule.direction(name, each.shape))
    return sums


def distances(sums, wanted) -> dict[str, float]:
    """Errors relative to the tolerance: 1e-3 of the norm; for the image gradient, 1e-3 of the RMS
    for 90 % of the pixels, and 1e-2 for the RMS error."""
    far: dict[str, Any] = {}
    for name in sums.keys() & wanted.keys():
        apart = np.abs(sums[name] - wanted[name])
        if name == "slope":
            scale = np.sqrt(np.mean(np.square(wanted[name])))
            most, together = np.quantile(apart, 0.9), np.sqrt(np.mean(np.square(apart)))
            far[name] = max(most / 1e-3, together / 1e-2) / scale
        else:
            far[name] = apart / (1e-3 * wanted["norm of " + name.partition(" of ")[2]])
    return far
