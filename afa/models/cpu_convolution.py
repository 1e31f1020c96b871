"""Convolution that is fast on CPUs too.

On an accelerator it is `lax.conv_general_dilated`. On CPUs, XLA's convolution reaches half of the
speed of its matrix products, its kernel gradient a quarter to a seventh, and on maps smaller than
the kernel it is a hundred times slower. Here a convolution is a matrix product over windows
(im2col), in blocks of as many images as have their windows in the CPU cache.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from afa import parallel

# Bytes of windows per block. Measured on two cores: training steps of ResNets are slower with 2.5
# and 10 MiB, those of other backbones not faster overall with 3 or 8 MiB.
CACHE = 5 << 20
# Channels of the convolutions into which small groups of a grouped convolution are merged.
GROUPED_CHANNELS = 32

Pads = tuple[tuple[int, int], ...]
Steps = tuple[int, ...]


@jax.custom_vjp
def product(rows: Float[Array, "n k"], kernel: Float[Array, "k d"]) -> Float[Array, "n d"]:
    """`rows @ kernel`, with a gradient that is fast on CPUs."""
    return rows @ kernel


product.defvjp(
    lambda rows, kernel: (rows @ kernel, (rows, kernel)),
    lambda kept, cotangent: (cotangent @ kept[1].T, _transposed_products([kept[0]], cotangent)[0]),
)


def _transposed_products(
    taps: Sequence[Float[Array, "n k"]], cotangent: Float[Array, "n d"]
) -> Float[Array, "taps k d"]:
    """Returns `tap.T @ cotangent` for every tap.

    XLA's matrix product over rows is slow, so one operand is transposed in memory first: the taps,
    or the cotangent and then the result, whichever moves less data. The barriers keep XLA from
    fusing the transposes into the products.
    """
    barrier = lax.optimization_barrier
    (rows, depth), width = taps[0].shape, cotangent.shape[1]
    if rows * depth * len(taps) < rows * width + len(taps) * depth * width:
        return jnp.stack([barrier(barrier(tap).T) @ cotangent for tap in taps])
    transposed = barrier(barrier(cotangent).T)
    return barrier(jnp.stack([transposed @ barrier(tap) for tap in taps]).swapaxes(1, 2))


def _flat(maps: Float[Array, "b h w c"]) -> Float[Array, "n c"]:
    return maps.reshape(-1, maps.shape[-1])


def _windows(lhs: Array, kernel: Sequence[int], steps: Steps, pads: Pads) -> list[Array]:
    """Returns the input of every kernel tap, row by row, as maps of the output size."""
    if any(sum(pair) for pair in pads):
        lhs = jnp.pad(lhs, ((0, 0), *pads, (0, 0)))
    height, width = _output_size(lhs.shape[1:3], kernel, steps, ((0, 0), (0, 0)))
    (sy, sx) = steps
    return [
        lhs[:, dy : dy + (height - 1) * sy + 1 : sy, dx : dx + (width - 1) * sx + 1 : sx]
        for dy in range(kernel[0])
        for dx in range(kernel[1])
    ]


def _output_size(size: Sequence[int], kernel: Sequence[int], steps: Steps, pads: Pads) -> list[int]:
    """Returns height and width of the output map."""
    each = zip(size, kernel, steps, pads, strict=True)
    return [(side + sum(pad) - k) // step + 1 for side, k, step, pad in each]


def im2col(
    lhs: Float[Array, "b h w c"], rhs: Float[Array, "kh kw c d"], steps: Steps, pads: Pads
) -> Float[Array, "b y x d"]:
    """The convolution as one matrix product over concatenated windows."""
    windows = _windows(lhs, rhs.shape[:2], steps, pads)
    columns = windows[0] if len(windows) == 1 else jnp.concatenate(windows, axis=-1)
    return product(_flat(columns), _flat(rhs)).reshape(*columns.shape[:3], rhs.shape[-1])


def xla(
    lhs: Float[Array, "b h w c"], rhs: Float[Array, "kh kw c d"], steps: Steps, pads: Pads
) -> Float[Array, "b y x d"]:
    """XLA's own convolution."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(lhs, rhs, steps, pads, dimension_numbers=dimensions)


def _block(lhs: Array, rhs: Array, steps: Steps, pads: Pads) -> int:
    """Returns how many images have windows that fit into `CACHE`: a divisor of the batch size, or 0
    if those of one image do not fit."""
    sides = _output_size(lhs.shape[1:3], rhs.shape[:2], steps, pads)
    image = math.prod(sides) * math.prod(rhs.shape[:3]) * lhs.dtype.itemsize
    fitting = range(1, min(len(lhs), CACHE // image) + 1)
    return max((n for n in fitting if len(lhs) % n == 0), default=0)


def _in_blocks(maps: Array, block: int) -> Array:
    return maps.reshape(-1, block, *maps.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def on_cpu(
    lhs: Float[Array, "b h w c"], rhs: Float[Array, "kh kw c d"], steps: Steps, pads: Pads
) -> Float[Array, "b y x d"]:
    """The convolution and its gradients, each in the faster form; equal up to rounding."""
    block = _block(lhs, rhs, steps, pads)
    if block == 0:
        return xla(lhs, rhs, steps, pads)
    if block == len(lhs):
        return im2col(lhs, rhs, steps, pads)
    found = lax.map(lambda x: im2col(x, rhs, steps, pads), _in_blocks(lhs, block))
    return found.reshape(len(lhs), *found.shape[2:])


def _forward(lhs: Array, rhs: Array, steps: Steps, pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    return on_cpu(lhs, rhs, steps, pads), (lhs, rhs)


def _input_cotangent(form: Callable, lhs: Array, rhs: Array, cotangent: Array) -> Array:
    return jax.vjp(lambda x: form(x, rhs), jnp.zeros_like(lhs))[1](cotangent)[0]


def _kernel_cotangent(lhs: Array, rhs: Array, steps: Steps, pads: Pads, cotangent: Array) -> Array:
    # Per tap: concatenating the windows would only move memory.
    taps = [_flat(window) for window in _windows(lhs, rhs.shape[:2], steps, pads)]
    return _transposed_products(taps, _flat(cotangent)).reshape(rhs.shape)


def _backward(
    steps: Steps, pads: Pads, kept: tuple[Array, Array], cotangent: Float[Array, "b y x d"]
) -> tuple[Array, Array]:
    lhs, rhs = kept
    block = _block(lhs, rhs, steps, pads)
    form = functools.partial(im2col if block else xla, steps=steps, pads=pads)
    if block == len(lhs):
        return _input_cotangent(form, lhs, rhs, cotangent), _kernel_cotangent(
            lhs, rhs, steps, pads, cotangent
        )

    def one_block(total: Array, both: tuple[Array, Array]) -> tuple[Array, Array | None]:
        x, dy = both
        input_cotangent = _input_cotangent(form, x, rhs, dy) if block else None
        return total + _kernel_cotangent(x, rhs, steps, pads, dy), input_cotangent

    blocks = (_in_blocks(lhs, block or 1), _in_blocks(cotangent, block or 1))
    kernel_cotangent, input_cotangent = lax.scan(one_block, jnp.zeros_like(rhs), blocks)
    if input_cotangent is None:
        return _input_cotangent(form, lhs, rhs, cotangent), kernel_cotangent
    return input_cotangent.reshape(lhs.shape), kernel_cotangent


on_cpu.defvjp(_forward, _backward)


def grouped(
    lhs: Float[Array, "b h w c"], rhs: Float[Array, "kh kw cg d"], steps: Steps, pads: Pads,
    groups: int,
) -> Float[Array, "b y x d"]:  # fmt: skip
    """Grouped convolution on the CPU.

    XLA's own gradient takes seconds. Here several small groups are merged into one convolution with
    a block-diagonal kernel, because a matrix product with 4 channels costs as much as with 30. A
    depthwise convolution is a weighted sum of the windows.
    """
    inside, out = rhs.shape[2], rhs.shape[3] // groups
    if inside == out == 1:
        taps = rhs.reshape(-1, groups)
        windows = _windows(lhs, rhs.shape[:2], steps, pads)
        return sum((w * t for w, t in zip(windows, taps, strict=True)), jnp.zeros((), lhs.dtype))
    shared = math.gcd(groups, max(GROUPED_CHANNELS // inside, 1))
    kernel = jnp.einsum(
        "yxcgsd,rs->yxrcgsd",
        rhs.reshape(*rhs.shape[:2], inside, groups // shared, shared, out),
        jnp.eye(shared, dtype=rhs.dtype),
    ).reshape(*rhs.shape[:2], shared * inside, -1)
    parts = [jnp.split(each, groups // shared, axis=-1) for each in (lhs, kernel)]
    return jnp.concatenate(
        [on_cpu(x, k, steps, pads) for x, k in zip(*parts, strict=True)], axis=-1
    )


def convolution(
    lhs: Float[Array, "b h w c"],
    rhs: Float[Array, "kh kw cg d"],
    window_strides: Sequence[int],
    padding: Any,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    *,
    feature_group_count: int = 1,
    **rest: Any,
) -> Float[Array, "b y x d"]:
    """Drop-in for `lax.conv_general_dilated` on NHWC maps; uses `on_cpu` without an accelerator.

    Args:
      padding: "SAME", "VALID" or a (before, after) pair per spatial dimension.
    """
    dilated = any(step != 1 for step in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    if parallel.accelerated() or dilated:
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            feature_group_count=feature_group_count,
            **rest,
        )
    kernel, steps = rhs.shape[:2], tuple(window_strides)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], kernel, steps, padding)
    pads = tuple((int(before), int(after)) for before, after in padding)
    if feature_group_count > 1:
        return grouped(lhs, rhs, steps, pads, feature_group_count)
    if kernel == (1, 1):  # a plain matrix product
        return im2col(lhs, rhs, steps, pads)
    return on_cpu(lhs, rhs, steps, pads)
