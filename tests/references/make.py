"""Runs the networks of torchvision, timm, transformers, pretrainedmodels and
efficientnet-lite-pytorch on the CPU and writes what the parity tests compare with:
`python -m tests.references.make [NAME ...]`.

Needs an environment of its own; `experiments.benchmarks.torch_zoo` says what is in it. Nothing is
downloaded: the networks are filled by `rule`.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.benchmarks import torch_zoo
from tests.support import rule

HERE = Path(__file__).parent

Case = tuple[Callable[[], Any], str, int]  # network, module that gives the mid map, image side


def own_cases() -> dict[str, Case]:
    """One a member of our backbones, by its name."""
    pools = {"vgg11": 15, "vgg13": 19, "vgg16": 23, "vgg19": 27,
             "vgg11_bn": 21, "vgg13_bn": 27, "vgg16_bn": 33, "vgg19_bn": 39}  # fmt: skip
    mids = {
        **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
                         "resnext50_32x4d", "wide_resnet50_2"), ("layer3", 64)),
        **{f"densenet{depth}": ("features.denseblock3", 64) for depth in (121, 161, 169, 201)},
        **{name: (f"features.{place}", 64) for name, place in pools.items()},
        # Of these two at 64 pixels some ReLU lies within rounding of turning over.
        "vgg19_bn": ("features.39", 32),
        "wide_resnet50_2": ("layer3", 96),
        "googlenet": ("inception4e", 64),
        "bn_inception": ("<inception_4e_3x3_reduce", 96),
        "inception_v3": ("Mixed_6e", 96),
        "squeezenet1_0": ("features.10", 64),
        "squeezenet1_1": ("features.7", 64),
        "mobilenet_v2": ("features.13", 64),
        # At these sides, maps are even at some strides and odd at others, which pads differently.
        "efficientnet_lite0": ("_blocks.10", 72),
        "efficientnet_lite1": ("_blocks.14", 72),
        "efficientnet_lite2": ("_blocks.14", 100),
        "vit_s16": ("blocks.7", 224),
        "vit_b16": ("blocks.7", 224),
        "vit_s14": ("dinov2.encoder.layer.7", 112),
        "vit_b14": ("dinov2.encoder.layer.7", 112),
        "vit_s14_reg": ("dinov2_with_registers.encoder.layer.7", 112),
        "vit_b14_reg": ("dinov2_with_registers.encoder.layer.7", 112),
    }  # fmt: skip
    return {
        name: (functools.partial(torch_zoo.build, name), mid, side)
        for name, (mid, side) in mids.items()
    }


def other_cases() -> dict[str, Case]:
    """The same networks under the names that other libraries have for their parameters."""
    torch_zoo.declare_operators()
    import timm
    import transformers
    from torchvision import models

    def in_timm(name: str, mid: str, side: int = 64, **options: Any) -> Case:
        return lambda: timm.create_model(name, **options), mid, side

    def vit() -> Any:
        config = transformers.ViTConfig(num_labels=1000, layer_norm_eps=1e-6)
        return transformers.ViTForImageClassification(config)

    def resnet() -> Any:
        config = transformers.ResNetConfig(num_labels=1000)
        return transformers.ResNetForImageClassification(config)

    return {
        "vit_b16.torchvision": (models.vit_b_16, "encoder.layers.encoder_layer_7", 224),
        "vit_s14_reg.timm": in_timm(
            "vit_small_patch14_reg4_dinov2", "blocks.7", 518, num_classes=0
        ),
        "resnet50.timm": in_timm("resnet50", "layer3"),
        "vgg16_bn.timm": in_timm("vgg16_bn", "features.33", 224),
        "densenet121.timm": in_timm("densenet121", "features.denseblock3"),
        "inception_v3.timm": in_timm("inception_v3", "Mixed_6e", 96),
        "vit_b16.transformers": (vit, "vit.layers.7", 224),
        "resnet50.transformers": (resnet, "resnet.encoder.stages.2", 64),
    }


def make(name: str, case: Case) -> None:
    """One reference: `NAME.npz` with its names and shapes, logits, mid map and gradients."""
    build, mid_name, side = case
    model = build().eval()
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    values = rule.filled({k: tuple(v.shape) for k, v in state.items()})
    model.load_state_dict({k: torch.from_numpy(v) for k, v in values.items()}, strict=False)
    kept: list[Any] = []
    modules = dict(model.named_modules())
    if mid_name.startswith("<"):  # what goes into a module
        modules[mid_name[1:]].register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    else:
        modules[mid_name].register_forward_hook(lambda _, __, out: kept.append(out))
    x = torch.from_numpy(rule.images(side)).permute(0, 3, 1, 2).requires_grad_()
    logits = model(x)
    logits = getattr(logits, "logits", logits)
    mid = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    mid = mid.permute(0, 2, 3, 1) if mid.ndim == 4 else mid
    weights = torch.from_numpy(rule.direction("logits", tuple(logits.shape)))
    (logits * weights).sum().backward()
    gradients = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    np.savez_compressed(
        HERE / f"{name}.npz",
        names=np.array(list(values)),
        shapes=np.array([" ".join(map(str, v.shape)) for v in values.values()]),
        side=side,
        logits=logits.detach().numpy(),
        mid=rule.sample(mid.detach().numpy()),
        slope=rule.sample(x.grad.permute(0, 2, 3, 1).numpy()),
        gradient_names=np.array(list(gradients)),
        gradient_dots=np.array(
            [np.vdot(g, rule.direction(n, g.shape)) for n, g in gradients.items()], np.float32
        ),
        gradient_norms=np.array([np.linalg.norm(g) for g in gradients.values()], np.float32),
    )
    print(name, tuple(logits.shape), tuple(mid.shape), f"{float(logits.abs().max()):.3g}")


def main() -> None:
    cases = own_cases() | other_cases()
    for name in sys.argv[1:] or cases:
        make(name, cases[name])


if __name__ == "__main__":
    main()
