"""Convolution that is fast on CPUs too.

On an accelerator it is `lax.conv_general_dilated`. XLA's CPU convolution reaches half of the speed
of its matrix products, its gradient to the kernel a quarter to a seventh, and on maps smaller than
the kernel it is a hundred times too slow. A convolution is also a product of matrices over cut-out
windows: here it is that, of as many images at a time as have their windows in the cache.
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

# Bytes of windows that the cache holds: on two cores the training step of the ResNets is slower
# with 2.5 and with 10 MiB, and other backbones are on the whole no faster with 3 or 8.
CACHE = 5 << 20
# Channels of the convolution that several groups of a grouped one share.
GROUPED_CHANNELS = 32

Pads = tuple[tuple[int, int], ...]
Steps = tuple[int, ...]


@jax.custom_vjp
def product(rows: Float[Array, "n k"], kernel: Float[Array, "k d"]) -> Float[Array, "n d"]:
    """`rows @ kernel`, with a gradient that is fast on the CPU."""
    return rows @ kernel


product.defvjp(
    lambda rows, kernel: (rows @ kernel, (rows, kernel)),
    lambda kept, cotangent: (cotangent @ kept[1].T, _over_rows([kept[0]], cotangent)[0]),
)


def _over_rows(
    taps: Sequence[Float[Array, "n k"]], cotangent: Float[Array, "n d"]
) -> Float[Array, "taps k d"]:
    """`rows.T @ slope` of every tap. XLA has a fast product of matrices but none over rows, so one
    side is turned over in memory first: every tap, or the slope and then what comes of it, which of
    the two moves less. The barriers keep XLA from merging the turns into what uses them."""
    fixed = lax.optimization_barrier
    (rows, depth), width = taps[0].shape, cotangent.shape[1]
    if rows * depth * len(taps) < rows * width + len(taps) * depth * width:
        return jnp.stack([fixed(fixed(tap).T) @ cotangent for tap in taps])
    turned = fixed(fixed(cotangent).T)
    return fixed(jnp.stack([turned @ fixed(tap) for tap in taps]).swapaxes(1, 2))


def _flat(maps: Float[Array, "b h w c"]) -> Float[Array, "n c"]:
    return maps.reshape(-1, maps.shape[-1])


def _windows(lhs: Array, kernel: Sequence[int], steps: Steps, pads: Pads) -> list[Array]:
    """What every tap of the kernel sees: maps of the convolved size, taps row by row."""
    if any(sum(pair) for pair in pads):
        lhs = jnp.pad(lhs, ((0, 0), *pads, (0, 0)))
    height, width = _convolved(lhs.shape[1:3], kernel, steps, ((0, 0), (0, 0)))
    (sy, sx) = steps
    return [
        lhs[:, dy : dy + (height - 1) * sy + 1 : sy, dx : dx + (width - 1) * sx + 1 : sx]
        for dy in range(kernel[0])
        for dx in range(kernel[1])
    ]


def _convolved(size: Sequence[int], kernel: Sequence[int], steps: Steps, pads: Pads) -> list[int]:
    """Sides of the convolved map."""
    each = zip(size, kernel, steps, pads, strict=True)
    return [(side + sum(pad) - k) // step + 1 for side, k, step, pad in each]


def im2col(
    lhs: Float[Array, "b h w c"], rhs: Float[Array, "kh kw c d"], steps: Steps, pads: Pads
) -> Float[Array, "b y x d"]:
    """The convolution as one matrix product over cut-out windows laid side by side."""
    windows = _windows(lhs, rhs.shape[:2], steps, pads)
    columns = windows[0] if len(windows) == 1 else jnp.concatenate(windows, axis=-1)
    return product(_flat(columns), _flat(rhs)).reshape(*columns.shape[:3], rhs.shape[-1])


def xla(
    lhs: Float[Array, "b h w c"], rhs: Float[Array, "kh kw c d"], steps: Steps, pads: Pads
) -> Float[Array, "b y x d"]:
    """The convolution as XLA has it."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(lhs, rhs, steps, pads, dimension_numbers=dimensions)


def _block(lhs: Array, rhs: Array, steps: Steps, pads: Pads) -> int:
    """How many images' windows fit into the cache: a divisor of the batch, or 0 if not even one
    image's do."""
    sides = _convolved(lhs.shape[1:3], rhs.shape[:2], steps, pads)
    image = math.prod(sides) * math.prod(rhs.shape[:3]) * lhs.dtype.itemsize
    fitting = range(1, min(len(lhs), CACHE // image) + 1)
    return max((n for n in fitting if len(lhs) % n == 0), default=0)


def _in_blocks(maps: Array, block: int) -> Array:
    return maps.reshape(-1, block, *maps.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def on_cpu(
    lhs: Float[Array, "b h w c"], rhs: Float[Array, "kh kw c d"], steps: Steps, pads: Pads
) -> Float[Array, "b y x d"]:
    """The convolution and its gradients, each in its faster form; equal up to rounding."""
    block = _block(lhs, rhs, steps, pads)
    if block == 0:
        return xla(lhs, rhs, steps, pads)
    if block == len(lhs):
        return im2col(lhs, rhs, steps, pads)
    found = lax.map(lambda x: im2col(x, rhs, steps, pads), _in_blocks(lhs, block))
    return found.reshape(len(lhs), *found.shape[2:])


def _forward(lhs: Array, rhs: Array, steps: Steps, pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    return on_cpu(lhs, rhs, steps, pads), (lhs, rhs)


def _to_input(form: Callable, lhs: Array, rhs: Array, cotangent: Array) -> Array:
    return jax.vjp(lambda x: form(x, rhs), jnp.zeros_like(lhs))[1](cotangent)[0]


def _to_kernel(lhs: Array, rhs: Array, steps: Steps, pads: Pads, cotangent: Array) -> Array:
    # Tap by tap: laying the windows side by side would only move memory.
    taps = [_flat(window) for window in _windows(lhs, rhs.shape[:2], steps, pads)]
    return _over_rows(taps, _flat(cotangent)).reshape(rhs.shape)


def _backward(
    steps: Steps, pads: Pads, kept: tuple[Array, Array], cotangent: Float[Array, "b y x d"]
) -> tuple[Array, Array]:
    lhs, rhs = kept
    block = _block(lhs, rhs, steps, pads)
    form = functools.partial(im2col if block else xla, steps=steps, pads=pads)
    if block == len(lhs):
        return _to_input(form, lhs, rhs, cotangent), _to_kernel(lhs, rhs, steps, pads, cotangent)

    def one(total: Array, both: tuple[Array, Array]) -> tuple[Array, Array | None]:
        x, s = both
        to_input = _to_input(form, x, rhs, s) if block else None
        return total + _to_kernel(x, rhs, steps, pads, s), to_input

    blocks = (_in_blocks(lhs, block or 1), _in_blocks(cotangent, block or 1))
    to_kernel, to_input = lax.scan(one, jnp.zeros_like(rhs), blocks)
    if to_input is None:
        return _to_input(form, lhs, rhs, cotangent), to_kernel
    return to_input.reshape(lhs.shape), to_kernel


on_cpu.defvjp(_forward, _backward)


def grouped(
    lhs: Float[Array, "b h w c"], rhs: Float[Array, "kh kw cg d"], steps: Steps, pads: Pads,
    groups: int,
) -> Float[Array, "b y x d"]:  # fmt: skip
    """A convolution whose channels fall into groups that do not see each other.

    XLA's own gradient takes seconds. Here several groups share a convolution with zeros between
    them, since a product of four channels costs as much as one of thirty; where every channel is a
    group of its own (depthwise), the windows are weighed and summed as they are.
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
    """`lax.conv_general_dilated` of NHWC maps, by `on_cpu` where there is no accelerator.

    `padding` is "SAME", "VALID" or one (before, after) pair a side.
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
    if kernel == (1, 1):  # a product of matrices as it stands
        return im2col(lhs, rhs, steps, pads)
    return on_cpu(lhs, rhs, steps, pads)
