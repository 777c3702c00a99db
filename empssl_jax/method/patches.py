"""Turns images into patches, on the device: pure functions of explicit keys.

Every augmentation is computed for every patch; a random mask selects the result. Without branches, `jax.vmap` compiles
one program for all patches.
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
    colours: bool = True,
) -> Float[Array, "B P size size 3"]:
    """Random augmented patches of images, float32 in [-1, 1] (section 3.1 and appendix of the paper).

    Patch p of an image depends only on `key`, the image's index and p. It depends neither on the other images of the
    batch nor on the number of patches.

    Args:
        key: shared by all images, for example the key of one seed and epoch.
        images: square images, uint8, or float in [0, 255].
        num_patches: P, patches per image.
        patch_area: area of a crop as a fraction of the image, in (0, 1].
        patch_size: side in pixels that crops are resized to.
        patch_aspect: highest ratio of the two sides of a crop; 1 for squares.
        interpolation: filter that resizes crops.
        indices: index of each image in the data set; default 0 to B-1.
        first_patch: number of the first patch, to make the patches of an image in several calls.
        colours: change colours, blur and solarize; otherwise patches are only cropped and mirrored.
    """
    indices = jnp.arange(len(images)) if indices is None else indices
    patch_numbers = first_patch + jnp.arange(num_patches)
    options = (patch_area, patch_size, patch_aspect, interpolation, colours)

    def patches_of(
        image: Shaped[Array | np.ndarray, "H W 3"], index: Int[Array | np.ndarray, ""]
    ) -> Float[Array, "P 3 size size"]:
        planes = jnp.moveaxis(image, -1, 0).astype(jnp.float32)
        image_key = jax.random.fold_in(key, index)
        return jax.vmap(lambda p: _random_patch(jax.random.fold_in(image_key, p), planes, *options))(patch_numbers)

    patches = jax.vmap(patches_of)(images, indices)
    return jnp.moveaxis(patches, 2, -1) / 127.5 - 1.0


def _random_patch(
    key: Key[Array, ""],
    planes: Float[Array, "3 H W"],
    patch_area: float,
    patch_size: int,
    patch_aspect: float,
    interpolation: Interpolation,
    colours: bool,
) -> Float[Array, "3 size size"]:
    """One random augmented patch of an image whose values are in [0, 255]; so are the patch's."""
    side = planes.shape[1]
    if patch_aspect == 1 and interpolation == "bilinear":  # all crops have one size, so they can be slices
        crop = crop_side(side, patch_area)
        recipe = draw_recipe(key, side - crop + 1)
        patch = square_crop(planes, recipe.top, recipe.left, crop, patch_size)
    else:
        sides = draw_sides(jax.random.fold_in(key, 0), side, patch_area, patch_aspect)
        recipe = draw_recipe(key, side - sides + 1)
        patch = resize_crop(planes, recipe.top, recipe.left, sides, patch_size, interpolation)
    return apply_recipe(patch, recipe) if colours else jnp.where(recipe.mirrored, mirror(patch), patch)


def grid_patch(
    images: Shaped[Array | np.ndarray, "B H W 3"],
    number: int | Int[Array, ""],
    grid_side: int,
    *,
    patch_area: float = PatchConfig.patch_area,
    patch_size: int = PatchConfig.patch_size,
    interpolation: Interpolation = PatchConfig.interpolation,
) -> Float[Array, "B size size 3"]:
    """One square crop of each image at a fixed position, not augmented, float32 in [-1, 1].

    The crops lie on a regular grid from edge to edge. A single crop lies in the middle.

    Args:
        images: square images, uint8, or float in [0, 255].
        number: number of the crop, counted row by row, from 0 to `grid_side` squared minus 1.
        grid_side: number of crops along each side of the image.
        patch_area: area of a crop as a fraction of the image, in (0, 1].
        patch_size: side in pixels that crops are resized to.
        interpolation: filter that resizes crops.
    """
    side = images.shape[1]
    crop = crop_side(side, patch_area)
    offsets = grid_offsets(side, crop, grid_side)
    top, left = (offsets[i] for i in (number // grid_side, number % grid_side))
    planes = jnp.moveaxis(images, -1, 1).astype(jnp.float32)
    sides = jnp.full(2, crop)
    patches = jax.vmap(lambda image: resize_crop(image, top, left, sides, patch_size, interpolation))(planes)
    return jnp.moveaxis(patches, 1, -1) / 127.5 - 1.0


def grid_offsets(side: int, crop: int, grid_side: int) -> Int[Array, " grid_side"]:
    """The offsets of a grid's crops along an axis, in pixels."""
    offsets = jnp.linspace(0, side - crop, grid_side) if grid_side > 1 else jnp.array([(side - crop) / 2])
    return jnp.round(offsets).astype(jnp.int32)


class Recipe(NamedTuple):
    """The random choices for one patch, except for the sides of its crop (`crops.draw_sides`)."""

    top: Int[Array, ""]  # offset of the crop in pixels
    left: Int[Array, ""]
    mirrored: Bool[Array, ""]
    jittered: Bool[Array, ""]
    # Places of brightness, contrast, saturation and hue in the order of these four changes, each 0 to 3.
    places: Int[Array, "4"]
    factors: Float[Array, "3"]  # of brightness, contrast and saturation, in [0.6, 1.4]
    hue_shift: Float[Array, ""]  # fraction of the full circle, in [-0.2, 0.2]
    gray: Bool[Array, ""]
    blur_sigma: Float[Array, ""]  # in pixels; 0 for no blur, else in [0.1, 2]
    solarized: Bool[Array, ""]


def draw_recipe(key: Key[Array, ""], num_offsets: int | Int[Array, "2"]) -> Recipe:
    """Draws a recipe for a patch whose crop has `num_offsets` possible offsets along each axis."""
    u = jax.random.uniform(key, (16,))  # all at once: see xla_cpu.py
    top, left = jnp.floor(u[:2] * num_offsets).astype(jnp.int32)
    mirrored, jittered, gray, blurred, solarized = u[2:7] < jnp.array([0.5, 0.8, 0.2, 0.1, 0.1])
    blur_sigma = jnp.where(blurred, 0.1 + 1.9 * u[7], 0.0)
    factors, hue_shift, places = 0.6 + 0.8 * u[8:11], 0.4 * u[11] - 0.2, jnp.argsort(u[12:16])
    return Recipe(top, left, mirrored, jittered, places, factors, hue_shift, gray, blur_sigma, solarized)


def apply_recipe(patch: Patch, recipe: Recipe) -> Patch:
    """Augments a crop: mirrors it, changes its colours, blurs and solarizes it, as the recipe says."""
    patch = jnp.where(recipe.mirrored, mirror(patch), patch)
    jittered = color_jitter(patch, recipe.places, recipe.factors, recipe.hue_shift)
    patch = jnp.where(recipe.jittered, jittered, patch)
    patch = jnp.where(recipe.gray, grayscale(patch), patch)
    patch = gaussian_blur(patch, recipe.blur_sigma)
    return jnp.where(recipe.solarized, solarize(patch), patch)
