"""Runs the networks of torchvision, timm, transformers and pretrainedmodels on the CPU and writes
what the parity tests compare with: `python tests/references/make.py [NAME ...]`.

Needs, in an environment of its own: torch, transformers, safetensors, munch, six, pyyaml, tqdm; and
without their dependencies (`pip install --no-deps`) torchvision, timm, pretrainedmodels. Nothing is
downloaded: the networks are filled by `rule`.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rule
import torch

HERE = Path(__file__).parent
OPERATORS = (
    "_deform_conv2d_backward", "_ps_roi_align_backward", "_ps_roi_pool_backward",
    "_roi_align_backward", "_roi_pool_backward", "deform_conv2d", "ps_roi_align", "ps_roi_pool",
    "qnms", "qroi_align", "roi_align", "roi_pool",
)  # fmt: skip


def declare_operators() -> list[torch.library.Library]:
    """torchvision without its compiled part imports once these are known."""
    library = torch.library.Library("torchvision", "DEF")
    for name in OPERATORS:
        library.define(f"{name}(Tensor x) -> Tensor")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return [library]


Case = tuple[Callable[[], Any], str, int]  # network, module that gives the mid map, picture side


def torchvision_cases() -> dict[str, Case]:
    from torchvision import models

    def plain(name: str, mid: str, side: int = 64, **options: Any) -> Case:
        return lambda: getattr(models, name)(weights=None, **options), mid, side

    bare = {"init_weights": False, "aux_logits": False}
    cases = {
        name: plain(name, "layer3")
        for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
                     "resnext50_32x4d", "wide_resnet50_2")
    }  # fmt: skip
    for depth in (121, 161, 169, 201):
        cases[f"densenet{depth}"] = plain(f"densenet{depth}", "features.denseblock3")
    pools = {11: (15, 21), 13: (19, 27), 16: (23, 33), 19: (27, 39)}
    for depth, (place, place_bn) in pools.items():
        cases[f"vgg{depth}"] = plain(f"vgg{depth}", f"features.{place}", init_weights=False)
        cases[f"vgg{depth}_bn"] = plain(
            f"vgg{depth}_bn", f"features.{place_bn}", init_weights=False
        )
    cases["googlenet"] = plain("googlenet", "inception4e", **bare)
    cases["inception_v3"] = plain("inception_v3", "Mixed_6e", 96, **bare)
    cases["squeezenet1_0"] = plain("squeezenet1_0", "features.10")
    cases["squeezenet1_1"] = plain("squeezenet1_1", "features.7")
    cases["vit_b16.torchvision"] = plain("vit_b_16", "encoder.layers.encoder_layer_7", 224)
    return cases


def timm_cases() -> dict[str, Case]:
    import timm

    def plain(name: str, mid: str, side: int = 64, **options: Any) -> Case:
        return lambda: timm.create_model(name, pretrained=False, **options), mid, side

    return {
        "vit_s16": plain("vit_small_patch16_224", "blocks.7", 224),
        "vit_b16": plain("vit_base_patch16_224", "blocks.7", 224),
        "vit_s14_reg.timm": plain("vit_small_patch14_reg4_dinov2", "blocks.7", 518, num_classes=0),
        "resnet50.timm": plain("resnet50", "layer3"),
        "vgg16_bn.timm": plain("vgg16_bn", "features.33", 224),
        "densenet121.timm": plain("densenet121", "features.denseblock3"),
        "inception_v3.timm": plain("inception_v3", "Mixed_6e", 96),
    }


def transformers_cases() -> dict[str, Case]:
    import transformers as t

    small = {"hidden_size": 384, "num_attention_heads": 6}
    dino = {"patch_size": 14, "image_size": 518, "num_labels": 1000}

    def dinov2(**options: Any) -> Case:
        make = lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**dino, **options))  # noqa: E731
        return make, "dinov2.encoder.layer.7", 112

    def registers(**options: Any) -> Case:
        make = lambda: t.Dinov2WithRegistersForImageClassification(  # noqa: E731
            t.Dinov2WithRegistersConfig(**dino, num_register_tokens=4, **options)
        )
        return make, "dinov2_with_registers.encoder.layer.7", 112

    return {
        "vit_s14": dinov2(**small),
        "vit_b14": dinov2(),
        "vit_s14_reg": registers(**small),
        "vit_b14_reg": registers(),
        "vit_b16.transformers": (
            lambda: t.ViTForImageClassification(t.ViTConfig(num_labels=1000, layer_norm_eps=1e-6)),
            "vit.layers.7",
            224,
        ),
        "resnet50.transformers": (
            lambda: t.ResNetForImageClassification(t.ResNetConfig(num_labels=1000)),
            "resnet.encoder.stages.2",
            64,
        ),
    }


def pretrainedmodels_cases() -> dict[str, Case]:
    from pretrainedmodels.models.bninception import BNInception

    return {"bn_inception": (lambda: BNInception(1000), "<inception_4e_3x3_reduce", 224)}


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
    x = torch.from_numpy(rule.pictures(side)).permute(0, 3, 1, 2).requires_grad_()
    logits = model(x)
    logits = getattr(logits, "logits", logits)
    mid = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    mid = mid.permute(0, 2, 3, 1) if mid.ndim == 4 else mid
    weights = torch.from_numpy(rule.direction("logits", tuple(logits.shape)))
    (logits * weights).sum().backward()
    slopes = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    np.savez_compressed(
        HERE / f"{name}.npz",
        names=np.array(list(values)),
        shapes=np.array([" ".join(map(str, v.shape)) for v in values.values()]),
        side=side,
        logits=logits.detach().numpy(),
        mid=rule.sample(mid.detach().numpy()),
        slope=rule.sample(x.grad.permute(0, 2, 3, 1).numpy()),
        gradient_names=np.array(list(slopes)),
        gradient_dots=np.array(
            [np.vdot(g, rule.direction(n, g.shape)) for n, g in slopes.items()], np.float32
        ),
        gradient_norms=np.array([np.linalg.norm(g) for g in slopes.values()], np.float32),
    )
    print(name, tuple(logits.shape), tuple(mid.shape), f"{float(logits.abs().max()):.3g}")


def main() -> None:
    kept = declare_operators()
    cases = torchvision_cases() | timm_cases() | transformers_cases() | pretrainedmodels_cases()
    for name in sys.argv[1:] or cases:
        make(name, cases[name])
    del kept


if __name__ == "__main__":
    main()
