"""Translates the parameter names of other libraries to those of our backbones.

Ours are torchvision's, or timm's for transformers. The library of a file is recognised by its keys.
A dialect is a list of regular expressions and replacements, applied in order.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Arrays = dict[str, np.ndarray]
Rules = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Dialect:
    """How one library names the parameters of a family.

    Attributes:
      name: name of the library.
      family: family of `afa.models.backbones` that it applies to.
      sign: regular expression that matches one of its keys and none of ours.
      rules: replacements, in order.
    """

    name: str
    family: str
    sign: str
    rules: Rules


HUGGING_RESNET: Rules = (
    (r"^resnet\.", ""),
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^classifier\.1\.", "fc."),
    (r"^encoder\.stages\.(\d)\.layers\.(\d+)\.", r"layer<\1>.\2."),
    (r"shortcut\.convolution\.", "downsample.0."),
    (r"shortcut\.normalization\.", "downsample.1."),
    (r"layer\.(\d)\.convolution\.", r"conv<\1>."),
    (r"layer\.(\d)\.normalization\.", r"bn<\1>."),
)
HUGGING_VIT: Rules = (
    (r"^(vit|dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"attention\.attention\.(query|key|value)\.", r"attn.\1."),
    (r"attention\.output\.dense\.", "attn.proj."),
    (r"attention\.q_proj\.", "attn.query."),
    (r"attention\.k_proj\.", "attn.key."),
    (r"attention\.v_proj\.", "attn.value."),
    (r"attention\.o_proj\.", "attn.proj."),
    (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."),
    (r"layer_scale1\.lambda1$", "ls1.gamma"),
    (r"layer_scale2\.lambda1$", "ls2.gamma"),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^pooler\..*", ""),
)
TORCHVISION_VIT: Rules = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_1\.", ".norm1."),
    (r"\.ln_2\.", ".norm2."),
    (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.linear_1\.|\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.linear_2\.|\.mlp\.3\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
)
DIALECTS = (
    Dialect("transformers", "resnet", r".*embedder\.embedder\.convolution\..*", HUGGING_RESNET),
    Dialect("transformers", "vit", r".*patch_embeddings\.projection\..*", HUGGING_VIT),
    Dialect("torchvision", "vit", r"conv_proj\..*", TORCHVISION_VIT),
    Dialect("DINOv2", "vit", r"register_tokens|mask_token", (("^register_tokens$", "reg_token"),)),
    Dialect(
        "timm", "vgg", r"pre_logits\..*",
        ((r"^pre_logits\.fc1\.", "classifier.0."), (r"^pre_logits\.fc2\.", "classifier.3."),
         (r"^head\.fc\.", "classifier.6.")),
    ),
    Dialect(
        "torchvision 0.2", "densenet", r".*denselayer\d+\.(norm|conv)\.[12]\..*",
        ((r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),),
    ),
)  # fmt: skip
# Library whose names a family has.
OURS = {
    "vit": "timm",
    "bn_inception": "pretrainedmodels",
    "efficientnet_lite": "efficientnet-lite-pytorch",
}
DEFAULT = "torchvision"


def translated(arrays: Mapping[str, np.ndarray], family: str) -> tuple[Arrays, str]:
    """Returns the arrays with our names, and the library whose names they had.

    Common prefixes of all keys have to be removed first (`parts.find`).
    """
    found = dict(arrays)
    name = OURS.get(family, DEFAULT)
    for dialect in DIALECTS:
        sign = re.compile(dialect.sign)
        if dialect.family == family and any(sign.fullmatch(key) for key in found):
            found, name = _renamed(found, dialect.rules), dialect.name
            break
    found.pop("", None)
    if family == "vit":
        found = _joined(found)
    return found, name


def _renamed(arrays: Arrays, rules: Rules) -> Arrays:
    found = {}
    for key, value in arrays.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        key = re.sub(r"<(\d+)>", lambda m: str(int(m[1]) + 1), key)  # from 0-based to 1-based
        found[key] = value
    return found


def _joined(arrays: Arrays) -> Arrays:
    """Adapts transformers: concatenates query, key and value, and adds a zero position for the
    class token if there is none (timm adds it to the class token itself)."""
    found = dict(arrays)
    for key in arrays:
        if ".attn.query." in key:
            names = [key.replace("query", each) for each in ("query", "key", "value")]
            if all(name in found for name in names):
                parts = [found.pop(name) for name in names]
                found[key.replace("query", "qkv")] = np.concatenate(parts)
    positions, first = found.get("pos_embed"), found.get("cls_token")
    if positions is not None and positions.ndim == 3 and first is not None:
        count = positions.shape[1]
        if round(count**0.5) ** 2 == count:
            zeros = np.zeros_like(positions[:, :1])
            found["pos_embed"] = np.concatenate([zeros, positions], axis=1)
    return found
