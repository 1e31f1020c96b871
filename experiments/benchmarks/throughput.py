"""Speed of the backbones compared with PyTorch.

    python -m experiments.benchmarks.throughput [NAME ...]

Measures each network with its classifier: the forward pass with running statistics, and forward and
backward pass with batch statistics. Both implementations have the same weights and are checked to
give the same logits. They alternate in one process on the same threads; ratios are between
consecutive turns. On accelerators both use bfloat16, and PyTorch is compiled. Needs the extra
`bench` and the libraries that `experiments.benchmarks.torch_zoo` names.
"""

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from afa.errors import UserError
from experiments.benchmarks.training import Contender, add_measurement, measure, prepare
from experiments.cli import Parser, perform

PROGRAM = "python -m experiments.benchmarks.throughput"
# One network of every kind; all others can be named.
DEFAULT = (
    "resnet18", "resnet50", "resnext50_32x4d", "vgg16", "vgg16_bn", "densenet121", "googlenet",
    "bn_inception", "inception_v3", "squeezenet1_0", "vit_s16", "vit_s14_reg",
)  # fmt: skip
TOLERANCE, BFLOAT16_TOLERANCE = 1e-3, 1e-1
LAYOUTS = ("channels_last", "contiguous_format")
PASSES = ("forward", "forward + backward")


def parser() -> Parser:
    """Returns the parser of the command line."""
    options = Parser(prog=PROGRAM, description=(__doc__ or "").partition("\n\n")[2])
    add = options.add_argument
    add("names", nargs="*", default=list(DEFAULT), metavar="NAME", help="backbones")
    add("--image_size", type=int, default=None,
        help="pixels (default: 64, or the least of a network; 224 on accelerators)")  # fmt: skip
    add("--batch_size", type=int, default=None, help="default: 32; 128 on accelerators")
    add_measurement(options, turns=5, steps=2)
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return perform(parser, _main, words)


def _main(chosen: argparse.Namespace) -> int:
    prepare(chosen)
    from afa import parallel, runtime
    from afa.console import table
    from afa.io import write_json
    from afa.models import backbones

    for name in chosen.names:
        backbones.member(name)
    batch = chosen.batch_size or (128 if parallel.accelerated() else 32)
    print(f"{parallel.platform()}, {chosen.threads} threads, batch {batch}, "
          f"{chosen.turns} turns of {chosen.steps} passes")  # fmt: skip
    found = {}
    for name in chosen.names:
        size = chosen.image_size or _side(name, parallel.accelerated())
        seconds = measure(contenders(name, size, batch), chosen.turns, chosen.steps)
        found[name] = {"image_size": size} | figures(seconds, batch)
        print(_summary(name, found[name]), flush=True)
        runtime.forget_programs()
    columns = ["backbone", "px", *(f"{p}, {c}" for p in PASSES for c in ("images/s", "/ torch"))]
    table(
        "backbones compared with torch", [_row(name, each) for name, each in found.items()], columns
    )
    if chosen.out:
        write_json(chosen.out, {"hardware": parallel.platform(), "threads": chosen.threads,
                                "batch_size": batch, "backbones": found})  # fmt: skip
    return 0


def _side(name: str, accelerated: bool) -> int:
    from afa.models import backbones

    member = backbones.member(name)
    if accelerated:
        return 224
    if member.smallest > 64:
        return 96
    return 64 if "14" not in name else 70  # patches of 14


def contenders(name: str, size: int, batch: int) -> dict[str, Contender]:
    """Builds both passes of both implementations and checks that their logits agree.

    Raises:
      UserError: they disagree, or the library of the network is not installed.
    """
    import jax
    import jax.numpy as jnp

    from afa import parallel
    from afa.config import BackboneConfig
    from afa.models import backbones, pretrained
    from afa.models.backbones.contract import Options
    from afa.models.embedder import IMAGENET_CLASSES
    from afa.models.networks import dtype_of
    from afa.models.pretrained import names, zoo

    model = _torch_network(name)
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    arrays, library = names.translated(state, backbones.family(name))
    weights = pretrained.Pretrained(arrays, name, "", library, backbones.member(name).preprocessing)
    config = BackboneConfig(name, head="imagenet")
    variables, _ = pretrained.load_weights(zoo.skeleton(name)[1], weights, config)
    variables = jax.tree.map(jnp.asarray, zoo.without_shapes(variables))
    options = Options(dtype=dtype_of("auto"), classes=IMAGENET_CLASSES)
    module = backbones.build(name, options)
    images = np.random.default_rng(0).standard_normal((batch, size, size, 3), np.float32)
    draws = np.random.default_rng(1).standard_normal((batch, IMAGENET_CLASSES), np.float32)

    def logits(variables: Any, x: Any, train: bool) -> Any:
        def run(module: Any, x: Any) -> Any:
            mid = module.lower(x, train, "clean")
            return module.logits(module.upper(mid, train, "clean"))

        return module.apply(variables, x, method=run, mutable=["batch_stats"] if train else False)

    def loss(params: Any, x: Any, draws: Any) -> Any:
        out, changed = logits(variables | {"params": params}, x, True)
        return jnp.sum(out.astype(jnp.float32) * draws), changed

    x, y = jnp.asarray(images), jnp.asarray(draws)
    forward = jax.jit(functools.partial(logits, train=False))
    backward = jax.jit(jax.grad(loss, has_aux=True))
    passes = {
        f"afa {PASSES[0]}": functools.partial(_repeat, lambda: forward(variables, x)),
        f"afa {PASSES[1]}": functools.partial(_repeat, lambda: backward(variables["params"], x, y)),
    }
    found = np.asarray(forward(variables, x), np.float32)
    for layout in LAYOUTS:
        of_torch, expected = _torch_contenders(model, images, draws, layout)
        passes |= of_torch
        error = np.abs(found - expected).max() / np.abs(expected).max()
        if not error <= (BFLOAT16_TOLERANCE if parallel.accelerated() else TOLERANCE):
            raise UserError(f"{name}: the implementations disagree: logits differ by {error:.1e}")
    return passes


def _repeat(call: Any, steps: int) -> None:
    import jax

    out = None
    for _ in range(steps):
        out = call()
    jax.block_until_ready(out)


def _torch_network(name: str) -> Any:
    """The PyTorch network with random weights and statistics that keep activations in scale."""
    import torch

    from experiments.benchmarks import torch_zoo

    model = torch_zoo.build(name)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=draw)
            elif value.ndim in (2, 4):
                value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=draw)
            elif value.is_floating_point() and not key.endswith("running_mean"):
                value.uniform_(0.4, 0.8, generator=draw)
    return model


def _torch_contenders(
    model: Any, images: np.ndarray, draws: np.ndarray, layout: str
) -> tuple[dict[str, Contender], np.ndarray]:
    """Both passes in PyTorch, and the logits."""
    import copy

    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    order = getattr(torch, layout)
    model = copy.deepcopy(model).to(device, memory_format=order).eval()
    call = torch.compile(model) if cuda else model
    x = torch.from_numpy(images).permute(0, 3, 1, 2).to(device).contiguous(memory_format=order)
    weights = torch.from_numpy(draws).to(device)
    parameters = list(model.parameters())

    def logits() -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            out = call(x)
        return getattr(out, "logits", out).float()

    def forward(steps: int) -> None:
        model.eval()
        out = torch.zeros(())
        with torch.inference_mode():
            for _ in range(steps):
                out = logits()
        float(out.sum())

    def backward(steps: int) -> None:
        for module in model.modules():
            module.train(isinstance(module, torch.nn.BatchNorm2d))
        out = [torch.zeros(())]
        for _ in range(steps):
            out = torch.autograd.grad((logits() * weights).sum(), parameters, allow_unused=True)
        float(out[-1].sum())

    with torch.inference_mode():
        expected = logits().cpu().numpy()
    return {f"{layout} {PASSES[0]}": forward, f"{layout} {PASSES[1]}": backward}, expected


def figures(seconds: Mapping[str, Sequence[float]], batch: int) -> dict[str, Any]:
    """Computes the metrics of each pass.

    Returns:
      Pass -> images per second of both implementations (median turn; torch in its faster layout)
      and afa's speed relative to torch with its 95 % interval over turns.
    """
    from afa.evaluation.statistics import mean_and_interval

    times = {name: np.asarray(each) for name, each in seconds.items()}
    found: dict[str, Any] = {}
    for kind in PASSES:
        afa_times = times[f"afa {kind}"]
        torch_times = min((times[f"{layout} {kind}"] for layout in LAYOUTS), key=np.median)
        ratio, interval = mean_and_interval(torch_times / afa_times)
        found[kind] = {
            "images_per_second": float(batch / np.median(afa_times)),
            "torch_images_per_second": float(batch / np.median(torch_times)),
            "speed_over_torch": ratio,
            "speed_over_torch_interval": interval,
        }
    return found


def _cells(found: Mapping[str, Any]) -> list[str]:
    return [
        cell
        for kind in PASSES
        for each in (found[kind],)
        for cell in (
            f"{each['images_per_second']:,.0f}",
            f"{each['speed_over_torch']:.2f} ± {each['speed_over_torch_interval']:.2f}",
        )
    ]


def _row(name: str, found: Mapping[str, Any]) -> list[Any]:
    return [name, str(found["image_size"]), *_cells(found)]


def _summary(name: str, found: Mapping[str, Any]) -> str:
    return f"{name}: " + "; ".join(
        f"{kind} {found[kind]['images_per_second']:,.0f} images/s, "
        f"{found[kind]['speed_over_torch']:.2f} of torch"
        for kind in PASSES
    )


if __name__ == "__main__":
    sys.exit(main())
