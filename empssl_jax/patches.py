"""Images to augmented patches, on the device: batched functions of explicit keys, as PIL and torchvision define them.

Pixels are float32 in [0, 255] and channels come first (3, H, W) inside this file, so that the colour operations work
on whole planes; `multi_patch` takes and returns channels last. Every operation is written for one patch and batched by
`jax.vmap`; each operation runs on every patch, with the factor that leaves it unchanged where the dice say so.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from empssl_jax.config import PatchConfig
from empssl_jax.crops import Interpolation, draw_sides, resize_crop

Patch = Float[Array, "3 H W"]
Scalar = Float[Array, ""]

GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R 601, PIL's conversion to L


def multi_patch(
    key: Key[Array, ""],
    images: Shaped[Array | np.ndarray, "B H W 3"],
    num_patches: int,
    *,
    patch_area: float = PatchConfig.patch_area,
    patch_size: int = PatchConfig.patch_size,
    patch_aspect: float = PatchConfig.patch_aspect,
    interpolation: Interpolation = PatchConfig.interpolation,
    indices: Int[Array | np.ndarray, " B"] | None = None,
    first_patch: int | Int[Array, ""] = 0,
) -> Float[Array, "B P size size 3"]:
    """Random augmented patches of images, float32 in [-1, 1] (section 3.1 and appendix of the paper).

    Patch p of an image depends only on `key`, the image's index and p: not on the batch it comes in, nor on how many
    other patches are made.

    Args:
        key: for all images, as of one seed and epoch.
        images: uint8, or float in [0, 255]; square.
        num_patches: P, patches an image.
        patch_area: area of a crop as a fraction of the image, in (0, 1].
        patch_size: side in pixels that crops are resized to.
        patch_aspect: highest ratio of the two sides of a crop; 1 for squares.
        interpolation: how crops are resized.
        indices: each image's index in the data set, 0 to B-1 if not given.
        first_patch: number of the first patch, to make the patches of an image in several calls.
    """
    indices = jnp.arange(len(images)) if indices is None else indices
    patch_numbers = first_patch + jnp.arange(num_patches)
    side = images.shape[1]
    crop = crop_side(side, patch_area)

    def patch_of(planes, patch_key):
        if patch_aspect == 1 and interpolation == "bilinear":  # crops are alike, so that they are slices
            recipe = draw_recipe(patch_key, side - crop + 1)
            patch = crop_and_mirror(planes, recipe.top, recipe.left, recipe.mirrored, crop, patch_size)
        else:
            sides = draw_sides(jax.random.fold_in(patch_key, 0), side, patch_area, patch_aspect)
            recipe = draw_recipe(patch_key, side - sides + 1)
            patch = resize_crop(planes, recipe.top, recipe.left, sides, patch_size, interpolation)
            patch = mirror(patch, recipe.mirrored)
        return apply_recipe(patch, recipe)

    def patches_of(image, index):
        planes = jnp.moveaxis(image, -1, 0).astype(jnp.float32)
        image_key = jax.random.fold_in(key, index)
        return jax.vmap(lambda p: patch_of(planes, jax.random.fold_in(image_key, p)))(patch_numbers)

    patches = jax.vmap(patches_of)(images, indices)
    return jnp.moveaxis(patches, 2, -1) / 127.5 - 1.0


def grid_patch(
    images: Shaped[Array | np.ndarray, "B H W 3"],
    number: int | Int[Array, ""],
    grid_side: int,
    *,
    patch_area: float = PatchConfig.patch_area,
    patch_size: int = PatchConfig.patch_size,
    interpolation: Interpolation = PatchConfig.interpolation,
) -> Float[Array, "B size size 3"]:
    """One square crop of each image, float32 in [-1, 1], its colours as they are and nothing about it random.

    The crops lie on a regular grid from edge to edge, or in the middle if there is but one.

    Args:
        images: uint8, or float in [0, 255]; square.
        number: of the crop, row by row, from 0 to `grid_side` squared less 1.
        grid_side: crops along each side of the image.
        patch_area: area of a crop as a fraction of the image, in (0, 1].
        patch_size: side in pixels that crops are resized to.
        interpolation: how crops are resized.
    """
    side = images.shape[1]
    crop = crop_side(side, patch_area)
    places = jnp.round(jnp.linspace(0, side - crop, grid_side) if grid_side > 1 else jnp.array([(side - crop) / 2]))
    top, left = (places[i].astype(jnp.int32) for i in (number // grid_side, number % grid_side))
    planes = jnp.moveaxis(images, -1, 1).astype(jnp.float32)
    sides = jnp.full(2, crop)
    patches = jax.vmap(lambda image: resize_crop(image, top, left, sides, patch_size, interpolation))(planes)
    return jnp.moveaxis(patches, 1, -1) / 127.5 - 1.0


class Recipe(NamedTuple):
    """All that is random about a patch."""

    top: Int[Array, ""]  # offset of the crop in pixels
    left: Int[Array, ""]
    mirrored: Bool[Array, ""]
    jittered: Bool[Array, ""]
    # The place, 0 to 3, at which brightness, contrast, saturation and hue are changed.
    places: Int[Array, "4"]
    factors: Float[Array, "3"]  # of brightness, contrast and saturation, in [0.6, 1.4]
    hue_shift: Float[Array, ""]  # fraction of the full circle, in [-0.2, 0.2]
    gray: Bool[Array, ""]
    blur_sigma: Float[Array, ""]  # in pixels, 0 for none, else in [0.1, 2]
    solarized: Bool[Array, ""]


def draw_recipe(key: Key[Array, ""], num_offsets: int | Int[Array, "2"]) -> Recipe:
    """Draws how to make a patch, its crop having `num_offsets` places along each axis.

    All numbers come from one draw, because each draw is a loop that takes XLA a fifth of a second to compile.
    """
    u = jax.random.uniform(key, (16,))
    top, left = jnp.floor(u[:2] * num_offsets).astype(jnp.int32)
    mirrored, jittered, gray, blurred, solarized = u[2:7] < jnp.array([0.5, 0.8, 0.2, 0.1, 0.1])
    blur_sigma = jnp.where(blurred, 0.1 + 1.9 * u[7], 0.0)
    factors, hue_shift, places = 0.6 + 0.8 * u[8:11], 0.4 * u[11] - 0.2, jnp.argsort(u[12:16])
    return Recipe(top, left, mirrored, jittered, places, factors, hue_shift, gray, blur_sigma, solarized)


def apply_recipe(patch: Patch, recipe: Recipe) -> Patch:
    """A crop with its colours changed, blurred and solarized as the recipe says."""
    jittered = color_jitter(patch, recipe.places, recipe.factors, recipe.hue_shift)
    patch = jnp.where(recipe.jittered, jittered, patch)
    patch = jnp.where(recipe.gray, grayscale(patch), patch)
    patch = gaussian_blur(patch, recipe.blur_sigma)
    return jnp.where(recipe.solarized, solarize(patch), patch)


def crop_side(image_side: int, patch_area: float) -> int:
    """Side in pixels of a square crop that covers `patch_area` of a square image."""
    return max(1, round(math.sqrt(patch_area) * image_side))


def bilinear_matrix(source: int, target: int) -> Float[Array, "target source"]:
    """PIL's bilinear resize of one axis: a triangle as wide as a source or a target pixel, whichever is larger."""
    scale = source / target
    centres = (jnp.arange(target) + 0.5) * scale
    distance = jnp.abs(jnp.arange(source)[None, :] + 0.5 - centres[:, None]) / max(scale, 1.0)
    weights = jnp.maximum(1.0 - distance, 0.0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def crop_and_mirror(image: Patch, top, left, mirrored, crop: int, patch_size: int) -> Float[Array, "3 size size"]:
    """The square of `crop` pixels at an offset, resized, and mirrored or not."""
    patch = jax.lax.dynamic_slice(image, (0, top, left), (len(image), crop, crop))
    if crop != patch_size:
        resize = bilinear_matrix(crop, patch_size)
        patch = apply_to_axes(patch, resize, resize)
    return mirror(patch, mirrored)


def mirror(patch: Patch, mirrored) -> Patch:
    """The patch with left and right exchanged, or as it is."""
    return jnp.where(mirrored, patch[:, :, ::-1], patch)


def apply_to_axes(
    patch: Float[Array, "C H W"], rows: Float[Array, "I H"], columns: Float[Array, "J W"]
) -> Float[Array, "C I J"]:
    """Applies a matrix to each axis of all planes.

    For small planes the second is a sum of products on purpose: for a matrix product XLA's CPU compiler would turn the
    planes around and back, which takes three times as long as all the rest. From 64x64 pixels on, the sum takes twenty
    times as long as the product.
    """
    wide = jnp.einsum("chw,jw->chj", patch, columns, precision=jax.lax.Precision.HIGHEST)
    if patch.shape[1] > 32:
        return jnp.einsum("chj,ih->cij", wide, rows, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(rows[None, :, :, None] * wide[:, None], axis=2)


def color_jitter(patch: Patch, places: Int[Array, "4"], factors: Float[Array, "3"], hue_shift: Scalar) -> Patch:
    """Brightness, contrast, saturation and hue, changed in the order of their places."""

    def blend_at(place, patch):
        """Applies the blend whose place this is; the place of the hue changes nothing."""
        brightness, contrast, saturation = places[:3] == place
        gray = luma(patch)
        other = jnp.where(saturation, gray, jnp.where(contrast, jnp.mean(gray), 0.0))
        factor = jnp.where(brightness | contrast | saturation, factors[jnp.argmax(places[:3] == place)], 1.0)
        return blend(patch, other, factor)

    def before_hue(place, patch):
        return jnp.where(place < places[3], blend_at(place, patch), patch)

    def after_hue(place, patch):
        return jnp.where(place > places[3], blend_at(place, patch), patch)

    # Loops, since XLA would merge a blend into each of the next one's parts and so compute it several times.
    patch = jax.lax.fori_loop(0, 3, before_hue, patch)
    return jax.lax.fori_loop(1, 4, after_hue, adjust_hue(patch, hue_shift))


def luma(patch: Patch) -> Float[Array, "1 H W"]:
    """Brightness as PIL's conversion to L weighs it."""
    return jnp.sum(patch * jnp.array(GRAY_WEIGHTS)[:, None, None], axis=0, keepdims=True)


def blend(patch: Patch, other: Float[Array, "..."], factor: Scalar) -> Patch:
    """`factor` of the patch and 1 - `factor` of the other, clipped to [0, 255]."""
    return jnp.clip(factor * patch + (1 - factor) * other, 0.0, 255.0)


def adjust_brightness(patch: Patch, factor: Scalar) -> Patch:
    """Blends with black."""
    return blend(patch, jnp.zeros((1, 1, 1)), factor)


def adjust_contrast(patch: Patch, factor: Scalar) -> Patch:
    """Blends with the mean brightness of the patch."""
    return blend(patch, jnp.mean(luma(patch)), factor)


def adjust_saturation(patch: Patch, factor: Scalar) -> Patch:
    """Blends with the gray patch."""
    return blend(patch, luma(patch), factor)


def adjust_hue(patch: Patch, shift: Scalar) -> Patch:
    """Turns the hue by `shift` of the full circle, in [-0.5, 0.5], through PIL's 8-bit HSV with its truncations."""
    red, green, blue = patch
    value = jnp.max(patch, axis=0)
    chroma = value - jnp.min(patch, axis=0)
    is_red, is_green = value == red, value == green
    difference = jnp.where(is_red, green - blue, jnp.where(is_green, blue - red, red - green))
    start = jnp.where(is_red, 0.0, jnp.where(is_green, 2.0, 4.0))
    turn = (start + difference / jnp.where(chroma > 0, chroma, 1.0)) / 6.0
    hue = jnp.floor((turn - jnp.floor(turn)) * 255.0) + jnp.trunc(shift * 255.0)
    saturation = jnp.floor(255.0 * chroma / jnp.maximum(value, 1.0)) / 255.0
    turned = (hue - 256.0 * jnp.floor(hue / 256.0)) * (6.0 / 255.0)
    # The hexagonal form of HSV to RGB: each channel is the value less a trapezoid of the hue's distance.
    k = jnp.array([5.0, 3.0, 1.0])[:, None, None] + turned
    k = jnp.where(k >= 6.0, k - 6.0, k)
    return value * (1.0 - saturation * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0))


def grayscale(patch: Patch) -> Patch:
    """Three equal channels of the patch's brightness."""
    return jnp.broadcast_to(luma(patch), patch.shape)


def gaussian_blur(patch: Patch, sigma: Scalar) -> Patch:
    """Blur of standard deviation `sigma` pixels as PIL approximates a Gaussian; 0 changes nothing."""
    return apply_to_axes(patch, *(_blur_matrix(side, sigma) for side in patch.shape[1:]))


def _blur_matrix(side, sigma):
    """Three box filters in a row (Gwosdek et al. 2011), the edge pixels repeated outwards."""
    variance = sigma**2 / 3
    whole = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    radius = whole + part  # a box of 2 radius + 1 pixels, its two ends covered in part
    steps = jnp.arange(side)[None, :] - jnp.arange(side)[:, None]
    covered = jnp.clip((steps + radius + 1) / (2 * radius + 1), 0.0, 1.0).at[:, -1].set(1.0)
    box = jnp.diff(covered, axis=1, prepend=0.0)
    return jnp.linalg.matrix_power(box, 3)


def solarize(patch: Patch) -> Patch:
    """Inverts what is at least 128."""
    return jnp.where(patch >= 128.0, 255.0 - patch, patch)
