"""Crops, resized as PIL does it: by two matrices, one for the rows and one for the columns.

Squares of one size are slices. Crops of any size and aspect ratio are one compiled program, since their place and sides
are traced numbers that only enter the weights of matrices for the whole image, with none outside of the crop.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from empssl_jax.method.xla_cpu import apply_to_axes

Interpolation = Literal["bilinear", "bicubic"]


def crop_side(image_side: int, patch_area: float) -> int:
    """Side in pixels of a square crop that covers `patch_area` of a square image."""
    return max(1, round(math.sqrt(patch_area) * image_side))


def square_crop(image: Float[Array, "C H W"], top, left, side: int, size: int) -> Float[Array, "C size size"]:
    """The square of `side` pixels at an offset, resized by bilinear interpolation: as `resize_crop`, but faster."""
    crop = jax.lax.dynamic_slice(image, (0, top, left), (len(image), side, side))
    if side == size:
        return crop
    resize = resize_matrix(0, side, side, size, "bilinear")
    return apply_to_axes(crop, resize, resize)


def draw_sides(key: Key[Array, ""], image_side: int, area: float, aspect: float) -> Int[Array, "2"]:
    """Height and width in pixels of a random crop, as torchvision's RandomResizedCrop draws them.

    The logarithm of their ratio is uniform within that of `aspect` either way, or as far as fits into the image.

    Args:
        key: of one patch.
        image_side: side of the square image in pixels.
        area: of the crop as a fraction of the image.
        aspect: highest ratio of the two sides, at least 1.
    """
    limit = min(math.log(aspect), -math.log(area))
    half = jax.random.uniform(key, minval=-limit, maxval=limit) / 2 if limit > 0 else jnp.zeros([])
    sides = image_side * math.sqrt(area) * jnp.exp(jnp.stack([-half, half]))
    return jnp.clip(jnp.round(sides).astype(jnp.int32), 1, image_side)


def resize_crop(
    image: Float[Array, "C H W"],
    top: Int[Array, ""] | int,
    left: Int[Array, ""] | int,
    sides: Int[Array, "2"],
    size: int,
    interpolation: Interpolation,
) -> Float[Array, "C size size"]:
    """The crop of `sides` (height, width) at an offset, resized, its values in [0, 255] as the image's."""
    rows, columns = (
        resize_matrix(start, length, source, size, interpolation)
        for start, length, source in zip((top, left), sides, image.shape[1:], strict=True)
    )
    highest = jax.lax.Precision.HIGHEST
    # PIL clips after each axis: a cubic overshoots at edges.
    wide = jnp.clip(jnp.einsum("chw,jw->chj", image, columns, precision=highest), 0.0, 255.0)
    return jnp.clip(jnp.einsum("chj,ih->cij", wide, rows, precision=highest), 0.0, 255.0)


def resize_matrix(
    start: Int[Array, ""] | int, length: Int[Array, ""] | int, source: int, target: int, interpolation: Interpolation
) -> Float[Array, "target source"]:
    """PIL's resize of `length` pixels from `start` on, of an axis of `source` pixels, to `target` pixels.

    The filter is as wide as a source or a target pixel, whichever is larger.
    """
    scale = length / target
    pixels = jnp.arange(source)
    centres = start + (jnp.arange(target) + 0.5) * scale
    distance = jnp.abs(pixels[None, :] + 0.5 - centres[:, None]) / jnp.maximum(scale, 1.0)
    inside = (pixels >= start) & (pixels < start + length)
    weights = jnp.where(inside[None, :], FILTERS[interpolation](distance), 0.0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _triangle(x):
    return jnp.maximum(1.0 - x, 0.0)


def _cubic(x):
    """Keys's cubic convolution (1981) with a = -1/2, of distances from 0."""
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return jnp.where(x < 1.0, near, jnp.where(x < 2.0, far, 0.0))


FILTERS = {"bilinear": _triangle, "bicubic": _cubic}
