"""Shared layers: convolution, BatchNorm and LayerNorm with a second set for the adversarial branch,
pooling."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from afa import parallel
from afa.models.cpu_convolution import convolution

Branch = Literal["clean", "adversarial"]
Dtype = Any


def apply(module: nn.Module | None, variables: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls `module.apply`, with a return type that suits all callers (linen declares a union).

    `module` must not be None. The type allows it because networks of the adversarial part are
    optional.
    """
    assert module is not None
    return module.apply(variables, *args, **kwargs)


he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(
    features: int,
    kernel: int | tuple[int, int],
    strides: int = 1,
    *,
    dtype: Dtype,
    padding: int | Literal["same"] | None = None,
    groups: int = 1,
    use_bias: bool = False,
    name: str | None = None,
    kernel_init: Callable = he_normal,
) -> nn.Conv:
    """Returns a convolution; the default padding is (kernel - 1) / 2 on each side, so that a stride
    of 2 halves even sides exactly.

    Args:
      padding: "same": that of TensorFlow, as little as gives ceil(side / strides) outputs, and one
        more after than before if it is odd.
    """
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    pads = [(side - 1) // 2 if padding in (None, "same") else padding for side in sides]
    return nn.Conv(
        features,
        sides,
        (strides, strides),
        padding="SAME" if padding == "same" else [(pad, pad) for pad in pads],
        feature_group_count=groups,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init,
        conv_general_dilated=convolution,
        name=name,
    )


class BatchNorm(nn.Module):
    """Batch normalisation over all devices, with separate statistics for each branch.

    The clean and the adversarial branch share scale and bias but have separate means and variances,
    because their inputs are distributed differently (AdvProp, Xie et al. 2020, section 4). AdvProp
    also duplicates scale and bias; here they are shared, as in pretrained weights.
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


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, ReLU: the basic unit of the Inception networks."""

    features: int
    kernel: int | tuple[int, int] = 1
    strides: int = 1
    padding: int | None = None
    epsilon: float = 1e-3
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool, branch: Branch
    ) -> Float[Array, "b y x d"]:
        x = conv(self.features, self.kernel, self.strides, padding=self.padding,
                 dtype=self.dtype, name="conv")(x)  # fmt: skip
        norm = BatchNorm(epsilon=self.epsilon, dtype=self.dtype, name="bn")
        return nn.relu(norm(x, train=train, branch=branch))


class LayerNorm(nn.Module):
    """Layer normalisation, with a second scale and bias for the adversarial branch.

    LayerNorm has no running statistics to separate, as BatchNorm has (AdvProp, Xie et al. 2020).
    Instead the adversarial branch has its own scale and bias, so that it does not affect the
    normalisation of the clean branch. They are stored as differences from the clean ones and start
    at zero, so that pretrained weights apply to both branches.
    """

    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b ... c"], *, branch: Branch = "clean"
    ) -> Float[Array, "b ... c"]:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        delta_scale = self.param("adversarial_scale", nn.initializers.zeros, shape)
        delta_bias = self.param("adversarial_bias", nn.initializers.zeros, shape)
        if branch == "adversarial":
            scale, bias = scale + delta_scale, bias + delta_bias
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return (centred * lax.rsqrt(variance + self.epsilon) * scale + bias).astype(self.dtype)


def max_pool(
    x: Float[Array, "b h w c"],
    kernel: int = 3,
    strides: int = 2,
    padding: int = 1,
    ceil: bool = False,
) -> Float[Array, "b y x c"]:
    """Max pooling over square windows; among equal values, the first receives the gradient.

    On the CPU it compares shifted maps, along rows and then along columns, because XLA's gradient
    of a pooling window takes as long there as ten convolutions.

    Args:
      ceil: also use a last window that extends beyond the edge (`ceil_mode` of PyTorch).
    """
    pads = [_pads(side, kernel, strides, padding, ceil) for side in x.shape[1:3]]
    if parallel.accelerated():
        return nn.max_pool(x, (kernel, kernel), (strides, strides), padding=pads)  # pyright: ignore
    for axis in (2, 1):
        x = functools.reduce(_larger, _shifted(x, axis, kernel, strides, pads[axis - 1], -jnp.inf))
    return x


def avg_pool(
    x: Float[Array, "b h w c"], kernel: int, strides: int, padding: int = 0
) -> Float[Array, "b y x c"]:
    """Average pooling over square windows, including zero padding; on the CPU as `max_pool`."""
    pads = [_pads(side, kernel, strides, padding, False) for side in x.shape[1:3]]
    if parallel.accelerated():
        return nn.avg_pool(x, (kernel, kernel), (strides, strides), padding=pads)  # pyright: ignore
    for axis in (2, 1):
        x = functools.reduce(jnp.add, _shifted(x, axis, kernel, strides, pads[axis - 1], 0.0))
    return x / kernel**2


def _pads(side: int, kernel: int, strides: int, padding: int, ceil: bool) -> tuple[int, int]:
    """Returns the padding before and after; a window must not begin in the padding after."""
    steps = (side + 2 * padding - kernel + (strides - 1 if ceil else 0)) // strides
    if ceil and steps * strides >= side + padding:
        steps -= 1
    return padding, max(steps * strides + kernel - side - padding, 0)


def _shifted(
    x: Array, axis: int, kernel: int, strides: int, pads: tuple[int, int], fill: float
) -> list[Array]:
    """Returns the input of each window position along one axis, over all windows."""
    if any(pads):
        around = [pads if each == axis else (0, 0) for each in range(x.ndim)]
        x = jnp.pad(x, around, constant_values=fill)
    windows = (x.shape[axis] - kernel) // strides
    return [lax.slice_in_dim(x, i, i + windows * strides + 1, strides, axis) for i in range(kernel)]


def _larger(a: Array, b: Array) -> Array:
    # Not `jnp.maximum`, which would split the gradient between equal values.
    return jnp.where(a >= b, a, b)


def adaptive_avg_pool(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b side side c"]:
    """Adaptive average pooling to `side` x `side`, with the windows of PyTorch."""

    def windows(length: int) -> np.ndarray:
        i, k = np.arange(length), np.arange(side)[:, None]
        inside = (i >= k * length // side) & (i < -(-(k + 1) * length // side))
        return (inside / inside.sum(1, keepdims=True)).astype(np.float32)

    down, across = windows(x.shape[1]), windows(x.shape[2])
    return jnp.einsum("bhwc,yh,xw->byxc", x, down, across)


def l2_normalise(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """L2 normalisation in float32; the epsilon keeps the gradient finite at 0."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


leaky_relu = functools.partial(nn.leaky_relu, negative_slope=0.2)
