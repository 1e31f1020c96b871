"""Layers every network here is made of: convolutions, and BatchNorm with a second set of
statistics."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from afa import parallel
from afa.models.convolution import convolution

Branch = Literal["clean", "adversarial"]
Dtype = Any


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
