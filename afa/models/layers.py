"""Layers every network here is made of: convolution that is fast on CPUs too, and BatchNorm with
a second set of statistics."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from afa import parallel

Branch = Literal["clean", "adversarial"]
Dtype = Any


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _pairs(padding: Any, lhs: Array, kernel: Sequence[int], strides: Sequence[int]) -> Any:
    if padding == "SAME":
        return [_same_padding(*each) for each in zip(lhs.shape[1:3], kernel, strides, strict=True)]
    return [(0, 0), (0, 0)] if padding == "VALID" else list(padding)


@jax.custom_vjp
def product(rows: Float[Array, "n k"], kernel: Float[Array, "k d"]) -> Float[Array, "n d"]:
    """`rows @ kernel`, with a gradient that is fast on the CPU.

    The kernel's gradient is a product over the rows, and XLA turns over the left operand in memory
    first: here that is the smaller one, whereas JAX's own rule always takes the slope.
    """
    return rows @ kernel


def _product_gradient(kept: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    rows, kernel = kept
    over_rows = (((0,), (0,)), ((), ()))
    if rows.shape[1] < slope.shape[1]:
        gradient = lax.dot_general(rows, slope, over_rows)
    else:
        gradient = lax.dot_general(slope, rows, over_rows).T
    return slope @ kernel.T, gradient


product.defvjp(lambda rows, kernel: (rows @ kernel, (rows, kernel)), _product_gradient)


def im2col_convolution(
    lhs: Float[Array, "b h w c"],
    rhs: Float[Array, "kh kw c d"],
    window_strides: Sequence[int],
    padding: Any,
) -> Float[Array, "b y x d"]:
    """The convolution as one matrix product over cut-out windows; equal to `lax.conv` up to
    rounding. `padding` is "SAME", "VALID" or one (before, after) pair for each side."""
    kernel, (sy, sx) = rhs.shape[:2], window_strides
    pads = _pairs(padding, lhs, kernel, (sy, sx))
    if any(sum(pair) for pair in pads):
        lhs = jnp.pad(lhs, ((0, 0), *pads, (0, 0)))
    height = (lhs.shape[1] - kernel[0]) // sy + 1
    width = (lhs.shape[2] - kernel[1]) // sx + 1
    windows = [
        lhs[:, dy : dy + (height - 1) * sy + 1 : sy, dx : dx + (width - 1) * sx + 1 : sx]
        for dy in range(kernel[0])
        for dx in range(kernel[1])
    ]
    columns = windows[0] if len(windows) == 1 else jnp.concatenate(windows, axis=-1)
    flat = product(columns.reshape(-1, columns.shape[-1]), rhs.reshape(-1, rhs.shape[-1]))
    return flat.reshape(-1, height, width, rhs.shape[-1])


def _below_kernel(lhs: Array, kernel: Sequence[int], strides: Any, padding: Any) -> bool:
    """Whether the convolved map has a side shorter than the kernel's."""
    pads = _pairs(padding, lhs, kernel, strides)
    sides = zip(lhs.shape[1:3], pads, kernel, strides, strict=True)
    return any((size + sum(pad) - k) // step + 1 < k for size, pad, k, step in sides)


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
    """`lax.conv_general_dilated`, by the faster of two ways on the CPU.

    XLA's CPU convolution, or its gradient, falls off a cliff on maps smaller than the kernel: there
    cutting the windows out and multiplying once is a hundred times faster. A pointwise convolution
    is a product of matrices as it stands.
    """
    kernel = rhs.shape[:2]
    plain = feature_group_count == 1 and not any(
        step != 1 for step in (*(lhs_dilation or ()), *(rhs_dilation or ()))
    )
    product_is_faster = kernel == (1, 1) or _below_kernel(lhs, kernel, window_strides, padding)
    if plain and product_is_faster and not parallel.accelerated():
        return im2col_convolution(lhs, rhs, window_strides, padding)
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


def apply(module: nn.Module | None, variables: Any, *args: Any, **kwargs: Any) -> Any:
    """`module.apply`, whose declared type in linen (a union with mutated variables) fits no caller.

    A module that may be missing, because the run has no adversarial part, has to be there.
    """
    assert module is not None
    return module.apply(variables, *args, **kwargs)


he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(
    features: int,
    kernel: int,
    strides: int = 1,
    *,
    dtype: Dtype,
    use_bias: bool = False,
    name: str | None = None,
    kernel_init: Callable = he_normal,
) -> nn.Conv:
    """A square convolution that halves exactly: padding (kernel - 1) / 2 on every side."""
    return nn.Conv(
        features,
        (kernel, kernel),
        (strides, strides),
        padding=[((kernel - 1) // 2, (kernel - 1) // 2)] * 2,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init,
        conv_general_dilated=convolution,
        name=name,
    )


class BatchNorm(nn.Module):
    """Batch normalisation over all devices, with one set of statistics a branch.

    The clean and the adversarial branch share scale and bias and keep means and variances apart,
    because their inputs are distributed differently (AdvProp, Xie et al. 2020, section 4; there
    the affine part is doubled too, which would double what a pretrained file must fill).
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32
    scale_init: Callable = nn.initializers.ones

    @nn.compact
    def __call__(
        self, x: Float[Array, "b ... c"], *, train: bool, branch: Branch = "clean"
    ) -> Float[Array, "b ... c"]:
        channels = x.shape[-1]
        scale = self.param("scale", self.scale_init, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        stored = {
            each: (
                self.variable("batch_stats", f"{each}_mean", jnp.zeros, (channels,)),
                self.variable("batch_stats", f"{each}_var", jnp.ones, (channels,)),
            )
            for each in ("clean", "adversarial")
        }
        mean, var = (each.value for each in stored[branch])
        if train and not self.is_initializing():
            axes = tuple(range(x.ndim - 1))
            wide = x.astype(jnp.float32)
            mean, square = parallel.pmean((wide.mean(axes), jnp.square(wide).mean(axes)))
            var = jnp.maximum(square - jnp.square(mean), 0)
            if self.is_mutable_collection("batch_stats"):
                for running, batch in zip(stored[branch], (mean, var), strict=True):
                    running.value = self.momentum * running.value + (1 - self.momentum) * batch
        gain = scale * lax.rsqrt(var + self.epsilon)
        return (x * gain.astype(x.dtype) + (bias - mean * gain).astype(x.dtype)).astype(self.dtype)


def batch_norm(dtype: Dtype, train: bool, branch: Branch) -> Callable[..., Array]:
    """`norm(x, name=..., zero=...)`: a BatchNorm of one call, bound to its mode."""

    def norm(x: Array, name: str, zero: bool = False) -> Array:
        init = nn.initializers.zeros if zero else nn.initializers.ones
        return BatchNorm(dtype=dtype, scale_init=init, name=name)(x, train=train, branch=branch)

    return norm


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b y x c"]:
    """3x3 maximum with stride 2 and padding 1; of equal places the first gets the slope.

    On the CPU by comparing neighbours, along rows and then along columns: XLA's gradient of a
    pooling window takes as long there as ten convolutions.
    """
    if parallel.accelerated():
        return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
    return _halve(_halve(x, axis=2), axis=1)


def _halve(x: Array, axis: int) -> Array:
    """Largest of three neighbours around every other place of one axis."""
    odd = x.shape[axis] % 2
    pads = [(1, 1 + odd) if each == axis else (0, 0) for each in range(x.ndim)]
    wide = jnp.pad(x, pads, constant_values=-jnp.inf)
    before, at, after = (
        lax.slice_in_dim(wide, i, i + x.shape[axis] + odd - 1, 2, axis) for i in range(3)
    )
    # No `jnp.maximum`: it would share the slope among equal places.
    largest = jnp.where(before >= at, before, at)
    return jnp.where(largest >= after, largest, after)


def l2_normalise(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Unit vectors in float32; the epsilon inside the root keeps the gradient of 0 finite."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


leaky_relu = functools.partial(nn.leaky_relu, negative_slope=0.2)
