"""Vision transformers: ViT-S/16 and B/16 (Dosovitskiy et al. 2021, arXiv:2010.11929; Steiner et al.
2022, arXiv:2106.10270) and the S/14 and B/14 of DINOv2 (Oquab et al. 2023, arXiv:2304.07193), with
layer scale (Touvron et al. 2021) and, as `_reg`, register tokens (Darcet et al. 2024,
arXiv:2309.16588). Parameter names are those of timm and of DINOv2's own files.

Maps are tokens (b, 1, tokens, c): the class token, the registers, then the patches row by row.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from afa.models import layers
from afa.models.backbones.contract import APACHE, HALF, Member, Options, Preprocessing

Tokens = Float[Array, "b 1 t c"]


class Attention(nn.Module):
    """Multi-head self-attention; the softmax is in float32."""

    heads: int
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        width = x.shape[-1]
        qkv = nn.Dense(3 * width, dtype=self.dtype, name="qkv")(x[:, 0])
        q, k, v = jnp.moveaxis(qkv.reshape(*qkv.shape[:2], 3, self.heads, -1), 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        weights = nn.softmax(scores / math.sqrt(q.shape[-1])).astype(self.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x[:, 0].shape)
        return nn.Dense(width, dtype=self.dtype, name="proj")(mixed)[:, None]


class MLP(nn.Module):
    """Two dense layers with a GELU between them."""

    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        width = x.shape[-1]
        x = nn.gelu(nn.Dense(4 * width, dtype=self.dtype, name="fc1")(x), approximate=False)
        return nn.Dense(width, dtype=self.dtype, name="fc2")(x)


class LayerScale(nn.Module):
    """Learned scale per channel, initialised to 1e-5."""

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        return x * self.param("gamma", nn.initializers.constant(1e-5), x.shape[-1:]).astype(x.dtype)


class TransformerBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)), with optional layer scale."""

    heads: int
    scaled: bool
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens, train: bool, branch: layers.Branch) -> Tokens:
        del train  # the same in training and evaluation
        parts = (Attention(self.heads, self.dtype, name="attn"), MLP(self.dtype, name="mlp"))
        for i, part in enumerate(parts, start=1):
            y = part(layers.LayerNorm(dtype=self.dtype, name=f"norm{i}")(x, branch=branch))
            x = x + (LayerScale(name=f"ls{i}")(y) if self.scaled else y)
        return x


class Patches(nn.Module):
    """Patch embedding: one linear layer per square patch."""

    width: int
    patch: int
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b y x c"]:
        kept = [side // self.patch * self.patch for side in x.shape[1:3]]
        x = x[:, : kept[0], : kept[1]].astype(self.dtype)
        return layers.conv(
            self.width, self.patch, self.patch, padding=0, use_bias=True, dtype=self.dtype,
            kernel_init=nn.initializers.truncated_normal(0.02), name="proj",
        )(x)  # fmt: skip


class ViT(nn.Module):
    """Image -> mid tokens (two thirds of the blocks) -> last tokens (all blocks, normalised).

    Attributes:
      native: image size of `pos_embed`, in pixels; interpolated for other sizes.
      smooth: antialias the interpolation (see `cubic`), as the authors of the network.
      registers: number of register tokens.
      scaled: use layer scale.
      both: the classifier uses the class token and the mean patch token, as in DINOv2, instead of
        the class token alone.
    """

    width: int
    heads: int
    depth: int
    patch: int
    native: int
    smooth: bool
    registers: int = 0
    scaled: bool = False
    both: bool = False
    options: Options = Options()

    STAGES = (
        r"patch_embed|cls_token|pos_embed|reg_token",
        *(rf"blocks\.({2 * i}|{2 * i + 1})" for i in range(5)),
        r"blocks\.1[01]|norm",
    )

    def setup(self) -> None:
        options, small = self.options, nn.initializers.truncated_normal(0.02)
        side = self.native // self.patch
        self.patch_embed = Patches(self.width, self.patch, options.dtype)
        self.cls_token = self.param("cls_token", small, (1, 1, self.width))
        self.pos_embed = self.param("pos_embed", small, (1, 1 + side**2, self.width))
        if self.registers:
            self.reg_token = self.param("reg_token", small, (1, self.registers, self.width))
        self.blocks = [
            options.block(TransformerBlock)(
                self.heads, self.scaled, options.dtype, name=f"blocks.{i}"
            )
            for i in range(self.depth)
        ]
        self.norm = layers.LayerNorm(dtype=options.dtype)
        if options.classes:
            self.head = nn.Dense(options.classes, dtype=options.dtype)

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches."""
        return 1 + self.registers

    def lower(
        self, x: Float[Array, "b h w 3"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b 1 t c"]:
        """Standardised image -> mid tokens."""
        x = self.patch_embed(x)
        batch, height, width, channels = x.shape
        x = x + self._positions(height, width).astype(x.dtype)
        first = jnp.broadcast_to(self.cls_token + self.pos_embed[:, :1], (batch, 1, channels))
        tokens = [first.astype(x.dtype)]
        if self.registers:
            registers = jnp.broadcast_to(self.reg_token, (batch, self.registers, channels))
            tokens.append(registers.astype(x.dtype))
        x = jnp.concatenate([*tokens, x.reshape(batch, -1, channels)], axis=1)[:, None]
        return self._run(x, self.blocks[: self._middle], train, branch)

    def upper(
        self, mid: Float[Array, "b 1 t c"], train: bool, branch: layers.Branch
    ) -> Float[Array, "b 1 t c"]:
        """Mid tokens -> last tokens."""
        return self.norm(self._run(mid, self.blocks[self._middle :], train, branch), branch=branch)

    @property
    def _middle(self) -> int:
        return 2 * self.depth // 3

    def _run(self, x: Tokens, blocks: Sequence, train: bool, branch: layers.Branch) -> Tokens:
        for block in blocks:
            x = block(x, train, branch)
        return x

    def _positions(self, height: int, width: int) -> Float[Array, "1 y x c"]:
        side = self.native // self.patch
        grid = jnp.asarray(self.pos_embed)[:, 1:].reshape(1, side, side, self.width)
        if (height, width) == (side, side):
            return grid
        rows, columns = (cubic(side, n, self.smooth) for n in (height, width))
        return jnp.einsum("bhwc,yh,xw->byxc", grid, rows, columns)

    def grid(self, mid: Float[Array, "b 1 t c"]) -> Float[Array, "b y x c"]:
        """Returns the patch tokens as a map, the input of the local head."""
        batch, _, _, channels = mid.shape
        patches = mid[:, 0, self.prefix :]
        side = math.isqrt(patches.shape[1])
        return patches.reshape(batch, side, side, channels)

    def pool(self, last: Float[Array, "b 1 t c"]) -> Float[Array, "b d"]:
        """Concatenates class token and mean patch token, the input of the global head."""
        x = last[:, 0].astype(jnp.float32)
        return jnp.concatenate([x[:, 0], x[:, self.prefix :].mean(1)], axis=-1)

    def logits(self, last: Float[Array, "b 1 t c"]) -> Float[Array, "b classes"]:
        """Last tokens -> scores of the classes of the published network."""
        return self.head(self.pool(last) if self.both else last[:, 0, 0])


def cubic(before: int, after: int, smooth: bool) -> Float[np.ndarray, "after before"]:
    """Returns the matrix of cubic interpolation along one axis, with pixel centres as in PyTorch.

    Args:
      smooth: antialias: when shrinking, widen the kernel; a = -1/2, and no taps beyond the edge.
        Otherwise a = -3/4, and the edge is repeated. a is the parameter of the cubic kernel.
    """
    a, width = (-0.5, max(before / after, 1.0)) if smooth else (-0.75, 1.0)
    centre = (np.arange(after) + 0.5) * before / after - 0.5
    reach = math.ceil(2 * width)
    taps = np.floor(centre)[:, None] + np.arange(-reach, reach + 1)
    d = np.abs(taps - centre[:, None]) / width
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    weights = np.where(d <= 1, near, np.where(d < 2, far, 0.0))
    if smooth:
        weights *= (taps >= 0) & (taps < before)
        weights /= weights.sum(1, keepdims=True)
    matrix = np.zeros((after, before))
    columns = np.clip(taps, 0, before - 1).astype(int)
    np.add.at(matrix, (np.arange(after)[:, None], columns), weights)
    return matrix.astype(np.float32)


def _member(
    width: int, patch: int, source: str, preprocessing: Preprocessing, registers: int = 0
) -> Member:
    dino = patch == 14
    native = 518 if dino else 224

    def build(options: Options) -> ViT:
        smooth = registers > 0 or not dino
        return ViT(width, width // 64, 12, patch, native, smooth, registers, dino, dino, options)

    return Member(build, source, APACHE, preprocessing, native, smallest=patch)


NO_CROP = Preprocessing(crop=1.0)  # mean and standard deviation of ImageNet

MEMBERS = {
    "vit_s16": _member(384, 16, "hf://timm/vit_small_patch16_224.augreg_in21k_ft_in1k", HALF),
    "vit_b16": _member(768, 16, "hf://timm/vit_base_patch16_224.augreg_in21k_ft_in1k", HALF),
    "vit_s14": _member(384, 14, "hf://facebook/dinov2-small", NO_CROP),
    "vit_b14": _member(768, 14, "hf://facebook/dinov2-base", NO_CROP),
    "vit_s14_reg": _member(384, 14, "hf://facebook/dinov2-with-registers-small", NO_CROP, 4),
    "vit_b14_reg": _member(768, 14, "hf://facebook/dinov2-with-registers-base", NO_CROP, 4),
}
