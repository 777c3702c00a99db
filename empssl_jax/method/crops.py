"""Crops, resized as in PIL: one matrix resizes the rows and another one the columns.

All crops of `square_crop` have one size, so it takes a slice. One compiled program of `resize_crop` makes crops of any
size and aspect ratio: their offsets and sides are traced numbers that only enter the weights of matrices for the whole
image, in which pixels outside the crop have weight 0.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from empssl_jax.method.xla_cpu import apply_to_axes

Interpolation = Literal["bilinear", "bicubic"]


def crop_side(image_side: int, patch_area: float) -> int:
    """Side in pixels of a square crop that covers the fraction `patch_area` of a square image; at least 1."""
    return max(1, round(math.sqrt(patch_area) * image_side))


def square_crop(
    image: Float[Array, "C H W"], top: Int[Array, ""] | int, left: Int[Array, ""] | int, side: int, size: int
) -> Float[Array, "C size size"]:
    """The square of `side` pixels at an offset, resized by bilinear interpolation: as `resize_crop`, but faster."""
    crop = jax.lax.dynamic_slice(image, (0, top, left), (len(image), side, side))
    if side == size:
        return crop
    resize = resize_matrix(0, side, side, size, "bilinear")
    return apply_to_axes(crop, resize, resize)


def draw_sides(key: Key[Array, ""], image_side: int, area: float, aspect: float) -> Int[Array, "2"]:
    """Draws height and width in pixels of a random crop, as torchvision's RandomResizedCrop does.

    The logarithm of width / height is uniform in [-log(aspect), log(aspect)], or in the part of this range whose crops
    fit into the image.

    Args:
        key: key of one patch.
        image_side: side of the square image in pixels.
        area: area of the crop as a fraction of the image.
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
    """The crop of `sides` (height, width) at an offset, resized; values are in [0, 255], as in the image."""
    rows, columns = (
        resize_matrix(start, length, source, size, interpolation)
        for start, length, source in zip((top, left), sides, image.shape[1:], strict=True)
    )
    highest = jax.lax.Precision.HIGHEST
    # PIL clips after each axis: cubic interpolation overshoots at edges.
    wide = jnp.clip(jnp.einsum("chw,jw->chj", image, columns, precision=highest), 0.0, 255.0)
    return jnp.clip(jnp.einsum("chj,ih->cij", wide, rows, precision=highest), 0.0, 255.0)


def resize_matrix(
    start: Int[Array, ""] | int, length: Int[Array, ""] | int, source: int, target: int, interpolation: Interpolation
) -> Float[Array, "target source"]:
    """The matrix by which PIL resizes a part of an axis to `target` pixels.

    The part has `length` pixels, starts at pixel `start`, and the whole axis has `source` pixels. The filter is as wide
    as a source pixel or a target pixel, whichever is larger.
    """
    scale = length / target
    pixels = jnp.arange(source)
    centres = start + (jnp.arange(target) + 0.5) * scale
    distance = jnp.abs(pixels[None, :] + 0.5 - centres[:, None]) / jnp.maximum(scale, 1.0)
    inside = (pixels >= start) & (pixels < start + length)
    weights = jnp.where(inside[None, :], FILTERS[interpolation](distance), 0.0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _triangle(x: Float[Array, "target source"]) -> Float[Array, "target source"]:
    """The kernel of linear interpolation at distances x."""
    return jnp.maximum(1.0 - x, 0.0)


def _cubic(x: Float[Array, "target source"]) -> Float[Array, "target source"]:
    """The kernel of cubic convolution (Keys 1981) with a = -1/2 at distances x."""
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return jnp.where(x < 1.0, near, jnp.where(x < 2.0, far, 0.0))


FILTERS = {"bilinear": _triangle, "bicubic": _cubic}
