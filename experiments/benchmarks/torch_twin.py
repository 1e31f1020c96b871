"""The baseline training step of F in PyTorch, for `experiments.benchmarks.training`, and the same
with a loss of pytorch-metric-learning, for `experiments.benchmarks.metric_learning`.

Modules and parameters have the names of their Flax counterparts, so that Flax parameters can be
loaded.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from afa.config import ExperimentConfig
from afa.models.backbones.contract import IMAGENET
from afa.models.backbones.resnet import EXPANSION
from afa.models.embedder import FUSED
from afa.models.networks import build_backbone

STEM = 64  # channels of the stem and the first stage

LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}

Batch = Mapping[str, np.ndarray]


def _conv(inside: int, outside: int, kernel: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, kernel, stride, (kernel - 1) // 2, bias=bias)


class Block(nn.Module):
    """A residual block, basic or bottleneck (v1.5)."""

    def __init__(self, kind: str, inside: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * EXPANSION[kind]
        basic = [(inside, width, 3, stride), (width, out, 3, 1)]
        bottleneck = [(inside, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        self.depth = len(basic if kind == "basic" else bottleneck)
        for i, shape in enumerate(basic if kind == "basic" else bottleneck, start=1):
            self.add_module(f"conv{i}", _conv(*shape))
            self.add_module(f"bn{i}", nn.BatchNorm2d(shape[1]))
        self.downsample = None
        if stride > 1 or inside != out:
            self.downsample = nn.Sequential(_conv(inside, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu(y, inplace=True) if i < self.depth else y
        x = x if self.downsample is None else self.downsample(x)
        return F.relu(y.add_(x), inplace=True)


class Backbone(nn.Module):
    """ResNet with the ImageNet stem: images -> second to last and last feature map."""

    def __init__(self, kind: str, depths: Sequence[int]) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(3, STEM, 7, 2), nn.BatchNorm2d(STEM)
        inside, self.names = STEM, []
        for stage, depth in enumerate(depths):
            width, blocks = STEM * 2**stage, []
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Block(kind, inside, width, stride))
                inside = width * EXPANSION[kind]
            self.names.append(f"layer{stage + 1}")
            self.add_module(self.names[-1], nn.Sequential(*blocks))
        self.mid, self.last = inside // 2, inside

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        maps = [F.max_pool2d(x, 3, 2, 1)]
        for name in self.names:
            maps.append(getattr(self, name)(maps[-1]))
        return maps[-2], maps[-1]


class GlobalHead(nn.Module):
    """GeM pooling, layer normalisation without affine parameters, linear layer, L2 norm."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor(3.0))
        self.linear = nn.Linear(channels, dim)

    def forward(self, last: Tensor) -> Tensor:
        floored = last.float().clamp(min=1e-4)
        pooled = floored.pow(self.power).mean((2, 3)).pow(1 / self.power)
        return F.normalize(self.linear(F.layer_norm(pooled, pooled.shape[1:], eps=1e-6)))


class LocalHead(nn.Module):
    """Attention-pooled local features of the second to last feature map."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.describe = _conv(channels, dim, 1, bias=True)
        self.attend = _conv(channels, 1, 1, bias=True)

    def forward(self, mid: Tensor) -> Tensor:
        attention = F.softplus(self.attend(mid).float())
        return F.normalize((F.normalize(self.describe(mid).float()) * attention).sum((2, 3)))


class Twin(nn.Module):
    """F with heads and proxies: images and labels -> metric loss (normalised softmax)."""

    def __init__(self, config: ExperimentConfig, classes: int) -> None:
        super().__init__()
        dim, local = config.embedder.embedding_dim, config.embedder.local_dim
        self.loss = config.loss
        ours = build_backbone(config)
        self.backbone = Backbone(ours.kind, ours.depths)
        self.global_head = GlobalHead(self.backbone.last, dim)
        self.local_head = LocalHead(self.backbone.mid, local)
        self.class_head = nn.Parameter(torch.randn(classes, dim))
        self.local_class_head = nn.Parameter(torch.randn(classes, local))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        mid, last = self.backbone(images)
        rows = self._blocks(self.global_head(last), self.local_head(mid))
        proxies = self._blocks(F.normalize(self.class_head), F.normalize(self.local_class_head))
        weights = (1.0, self.loss.local_weight, self.loss.fused_weight)
        losses = [
            weight * F.cross_entropy(x.float() @ p.T / self.loss.posterior_temperature, labels)
            for weight, x, p in zip(weights, rows, proxies, strict=True)
        ]
        return torch.stack(losses).sum() / sum(weights)

    @staticmethod
    def _blocks(global_descriptor: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = [math.sqrt(FUSED["global"]) * global_descriptor, math.sqrt(FUSED["local"]) * local]
        return global_descriptor, local, F.normalize(torch.cat(parts, dim=1))


def load_flax_params(model: Twin, params: Mapping[str, np.ndarray]) -> Twin:
    """Loads Flax parameters into the model.

    Args:
      model: the PyTorch model.
      params: dotted path -> array, with the axes of Flax.

    Raises:
      RuntimeError: a parameter is missing, unexpected or of another shape.
    """
    state = {}
    for path, value in params.items():
        name = path.removesuffix("kernel").removesuffix("scale")
        name = path if name == path else f"{name}weight"
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim) if path.endswith("kernel") else None
        state[name] = torch.from_numpy(np.array(value if axes is None else value.transpose(axes)))
    own = dict(model.named_buffers())
    model.load_state_dict(state | own)
    return model


class OneDescriptor(nn.Module):
    """The backbone and the global head of a twin, with a loss of descriptors and labels."""

    def __init__(self, twin: Twin, loss: nn.Module) -> None:
        super().__init__()
        self.backbone, self.global_head, self.loss = twin.backbone, twin.global_head, loss

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.describe(images), labels)

    def describe(self, images: Tensor) -> Tensor:
        """Images -> unit descriptors."""
        return self.global_head(self.backbone(images)[1])


class Trainer:
    """Takes training steps as `afa.train`: loss, gradient, clipping, AdamW, moving average.

    On a GPU the model is compiled and uses bfloat16.

    Args:
      config: sizes and optimiser.
      model: images and labels -> loss.
      layout: memory layout of feature maps, one of `LAYOUTS`.
      rate: step -> learning rate; None: `optim.learning_rate`.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        model: nn.Module,
        layout: str,
        rate: Callable[[int], float] | None = None,
    ) -> None:
        self.rate = rate
        self.optim, self.order = config.optim, LAYOUTS[layout]
        self.standardise = config.embedder.standardise
        self.fast = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.fast else "cpu")
        self.model = model.to(self.device, memory_format=self.order)  # pyright: ignore
        self.forward: Any = torch.compile(self.model) if self.fast else self.model
        # The integer counters of BatchNorm are not averaged.
        self.now = [x for x in self.model.state_dict().values() if x.is_floating_point()]
        self.average = [x.clone() for x in self.now]
        kernels, others = [], []
        for name, each in self.model.named_parameters():
            (kernels if name.endswith("weight") and each.ndim > 1 else others).append(each)
        groups = [{"params": kernels}, {"params": others, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(
            groups, self.optim.learning_rate, weight_decay=self.optim.weight_decay, fused=True
        )
        self.mean, self.std = (
            torch.tensor(each, device=self.device).reshape(1, 3, 1, 1)
            for each in (IMAGENET.mean, IMAGENET.std)
        )
        self.steps = 0

    def step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Takes one step on "image" and "label"; returns loss and gradient norm, without waiting
        for the device."""
        images, labels = (
            torch.from_numpy(batch[name]).to(self.device, non_blocking=True)
            for name in ("image", "label")
        )
        if self.rate is not None:
            for group in self.optimiser.param_groups:
                group["lr"] = self.rate(self.steps)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast):
            loss = self.forward(self.prepared(images), labels.long())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        decay = min(self.optim.ema_decay, (1 + self.steps) / (10 + self.steps))
        get_ema_multi_avg_fn(decay)(self.average, self.now, self.steps)
        self.steps += 1
        return loss.detach(), norm

    def prepared(self, images: Tensor) -> Tensor:
        """Pixels (b, h, w, 3), 0 to 255 -> the input of the backbone."""
        images = images.permute(0, 3, 1, 2).float() / 255
        if self.standardise:
            mean = images.mean((1, 2, 3), keepdim=True)
            spread = ((images - mean).square().mean((1, 2, 3), keepdim=True) + 1e-4).sqrt()
            images = 0.5 + 0.25 * (images - mean) / spread
        images = (images - self.mean) / self.std
        return images.contiguous(memory_format=self.order)

    def use_average(self) -> None:
        """Ends training: the model gets the moving average of its parameters and statistics."""
        for now, average in zip(self.now, self.average, strict=True):
            now.copy_(average)
        self.model.eval()
