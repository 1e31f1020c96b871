"""Published networks in PyTorch, by the names of our backbones.

Needs, beside torch: transformers and efficientnet-lite-pytorch; and, installed without their
dependencies, torchvision, timm and pretrainedmodels (with munch and six). No weights are
downloaded.
"""

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from afa.errors import UserError

OPERATORS = (
    "_deform_conv2d_backward", "_ps_roi_align_backward", "_ps_roi_pool_backward",
    "_roi_align_backward", "_roi_pool_backward", "deform_conv2d", "ps_roi_align", "ps_roi_pool",
    "qnms", "qroi_align", "roi_align", "roi_pool",
)  # fmt: skip
CLASSES = 1000
IN_TIMM = {"vit_s16": "vit_small_patch16_224", "vit_b16": "vit_base_patch16_224"}


@functools.cache
def declare_operators() -> list[torch.library.Library]:
    """Makes torchvision importable: without its compiled part, its operators have to be declared.

    The declarations last as long as the returned object is referenced.
    """
    try:
        importlib.import_module("torchvision")
        return []
    except (ImportError, RuntimeError):  # the second names an operator that does not exist
        for name in [each for each in sys.modules if each.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in OPERATORS:
        library.define(f"{name}(Tensor x) -> Tensor")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return [library]


def build(name: str) -> torch.nn.Module:
    """Builds the network with its classifier and random weights.

    Raises:
      UserError: the library of the network is not installed.
    """
    declare_operators()
    makers: dict[str, tuple[str, Callable[[str, Any], Any]]] = {
        "bn_inception": ("pretrainedmodels.models.bninception", _bn_inception),
        "vit_s14": ("transformers", _dinov2),
        "vit_b14": ("transformers", _dinov2),
        "vit_s14_reg": ("transformers", _dinov2),
        "vit_b14_reg": ("transformers", _dinov2),
        **dict.fromkeys(IN_TIMM, ("timm", _timm)),
        **{f"efficientnet_lite{i}": ("efficientnet_lite_pytorch", _lite) for i in range(3)},
    }
    library, make = makers.get(name, ("torchvision.models", _torchvision))
    try:
        module = importlib.import_module(library)
    except ImportError as error:
        raise UserError(f"{name} needs {library} ({error})") from None
    return make(name, module)


def _torchvision(name: str, models: Any) -> torch.nn.Module:
    options: dict[str, Any] = {}
    if name.startswith("vgg"):
        options = {"init_weights": False}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False, "aux_logits": False}
    return getattr(models, name)(weights=None, **options)


def _timm(name: str, timm: Any) -> torch.nn.Module:
    return timm.create_model(IN_TIMM[name], dynamic_img_size=True)  # images of any size


def _bn_inception(name: str, module: Any) -> torch.nn.Module:
    model = module.BNInception(CLASSES)
    model.global_pool = torch.nn.AdaptiveAvgPool2d(1)  # equal at 224 px, and for any other size
    return model


def _lite(name: str, package: Any) -> torch.nn.Module:
    # Without an image size, the padding is that of the size of each input.
    return package.EfficientNet.from_name(name.replace("_", "-"), image_size=None)


def _dinov2(name: str, transformers: Any) -> torch.nn.Module:
    options = {"patch_size": 14, "image_size": 518, "num_labels": CLASSES}
    if "_s14" in name:
        options |= {"hidden_size": 384, "num_attention_heads": 6}
    kind = "Dinov2"
    if name.endswith("_reg"):
        kind, options = "Dinov2WithRegisters", options | {"num_register_tokens": 4}
    config = getattr(transformers, f"{kind}Config")(**options)
    return getattr(transformers, f"{kind}ForImageClassification")(config)
