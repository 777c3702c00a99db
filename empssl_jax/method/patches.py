"""Images to patches, on the device: pure functions of explicit keys.

Every patch undergoes every augmentation, whose outcome is taken where the dice say so: no branch depends on them, so
that `jax.vmap` makes one program of all.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from empssl_jax.config import PatchConfig
from empssl_jax.method.augmentations import Patch, color_jitter, gaussian_blur, grayscale, mirror, solarize
from empssl_jax.method.crops import Interpolation, crop_side, draw_sides, resize_crop, square_crop


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
            patch = square_crop(planes, recipe.top, recipe.left, crop, patch_size)
        else:
            sides = draw_sides(jax.random.fold_in(patch_key, 0), side, patch_area, patch_aspect)
            recipe = draw_recipe(patch_key, side - sides + 1)
            patch = resize_crop(planes, recipe.top, recipe.left, sides, patch_size, interpolation)
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
    """A crop mirrored, its colours changed, blurred and solarized as the recipe says."""
    patch = jnp.where(recipe.mirrored, mirror(patch), patch)
    jittered = color_jitter(patch, recipe.places, recipe.factors, recipe.hue_shift)
    patch = jnp.where(recipe.jittered, jittered, patch)
    patch = jnp.where(recipe.gray, grayscale(patch), patch)
    patch = gaussian_blur(patch, recipe.blur_sigma)
    return jnp.where(recipe.solarized, solarize(patch), patch)
