"""Images to augmented patches, on the device: batched functions of explicit keys, as PIL and torchvision define them.

Pixels are float32 in [0, 255] and channels come first (3, H, W) inside this file, so that the colour operations work
on whole planes; `multi_patch` takes and returns channels last. Every operation is written for one patch and batched by
`jax.vmap`: crop, resize, flip and blur are small matrix products, and each colour operation runs on every patch,
with the factor that leaves it unchanged where the dice say so.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Shaped

from empssl_jax.config import PatchConfig

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
        indices: each image's index in the data set, 0 to B-1 if not given.
        first_patch: number of the first patch, to make the patches of an image in several calls.
    """
    indices = jnp.arange(len(images)) if indices is None else indices
    patch_numbers = first_patch + jnp.arange(num_patches)
    table = crop_table(images.shape[1], crop_side(images.shape[1], patch_area), patch_size)

    def patches_of(image, index):
        planes = jnp.moveaxis(image, -1, 0).astype(jnp.float32)
        image_key = jax.random.fold_in(key, index)
        return jax.vmap(lambda p: _augmented_patch(jax.random.fold_in(image_key, p), planes, table))(patch_numbers)

    patches = jax.vmap(patches_of)(images, indices)
    return jnp.moveaxis(patches, 2, -1) / 127.5 - 1.0


def _augmented_patch(key, image: Patch, table) -> Float[Array, "3 size size"]:
    """One patch by the paper's recipe."""
    crop_key, jitter_key, apply_key, sigma_key = jax.random.split(key, 4)
    jitter, to_gray, to_blur, to_solarize = jax.random.uniform(apply_key, (4,)) < jnp.array([0.8, 0.2, 0.1, 0.1])
    sigma = jax.random.uniform(sigma_key, minval=0.1, maxval=2.0)
    patch = random_crop_flip(crop_key, image, table)
    patch = jnp.where(jitter, color_jitter(jitter_key, patch), patch)
    patch = jnp.where(to_gray, grayscale(patch), patch)
    patch = gaussian_blur(patch, jnp.where(to_blur, sigma, 0.0))
    return jnp.where(to_solarize, solarize(patch), patch)


def crop_side(image_side: int, patch_area: float) -> int:
    """Side in pixels of a square crop that covers `patch_area` of a square image."""
    return max(1, round(math.sqrt(patch_area) * image_side))


def crop_table(image_side: int, crop: int, patch_size: int) -> Float[Array, "offsets size side"]:
    """For each integer offset the matrix that crops and resizes one axis."""
    resize = bilinear_matrix(crop, patch_size)
    offsets = range(image_side - crop + 1)
    return jnp.stack([jnp.pad(resize, ((0, 0), (o, image_side - crop - o))) for o in offsets])


def bilinear_matrix(source: int, target: int) -> Float[Array, "target source"]:
    """PIL's bilinear resize of one axis: a triangle as wide as a source or a target pixel, whichever is larger."""
    scale = source / target
    centres = (jnp.arange(target) + 0.5) * scale
    distance = jnp.abs(jnp.arange(source)[None, :] + 0.5 - centres[:, None]) / max(scale, 1.0)
    weights = jnp.maximum(1.0 - distance, 0.0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def random_crop_flip(key, image: Patch, table) -> Float[Array, "3 size size"]:
    """A crop at a uniform integer offset, resized, and mirrored with probability 1/2."""
    top, left = jax.random.randint(key, (2,), 0, len(table))
    flip = jax.random.bernoulli(jax.random.fold_in(key, 2))
    rows, columns = table[top], table[left]
    columns = jnp.where(flip, columns[::-1], columns)
    return apply_to_axes(image, rows, columns)


def apply_to_axes(
    patch: Float[Array, "C H W"], rows: Float[Array, "I H"], columns: Float[Array, "J W"]
) -> Float[Array, "C I J"]:
    """Applies a matrix to each axis of all planes."""
    return jnp.einsum("ih,chw,jw->cij", rows, patch, columns, precision=jax.lax.Precision.HIGHEST)


def color_jitter(key, patch: Patch) -> Patch:
    """Brightness, contrast, saturation (factor in [0.6, 1.4]) and hue (shift in [-0.2, 0.2]) in a random order."""
    order_key, factor_key, hue_key = jax.random.split(key, 3)
    # position[i] is operation i's place in the order; the hue is operation 3.
    position = jax.random.permutation(order_key, 4)
    factors = jax.random.uniform(factor_key, (3,), minval=0.6, maxval=1.4)
    shift = jax.random.uniform(hue_key, minval=-0.2, maxval=0.2)

    def blend_at(place, patch):
        """Applies the blend whose place this is; the place of the hue changes nothing."""
        brightness, contrast, saturation = position[:3] == place
        gray = luma(patch)
        other = jnp.where(saturation, gray, jnp.where(contrast, jnp.mean(gray), 0.0))
        factor = jnp.where(brightness | contrast | saturation, factors[jnp.argmax(position[:3] == place)], 1.0)
        return blend(patch, other, factor)

    for place in range(3):
        patch = jnp.where(place < position[3], blend_at(place, patch), patch)
    patch = adjust_hue(patch, shift)
    for place in range(1, 4):
        patch = jnp.where(place > position[3], blend_at(place, patch), patch)
    return patch


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
    safe_chroma = jnp.where(chroma > 0, chroma, 1.0)
    sextant = jnp.where(
        value == red,
        (green - blue) / safe_chroma,
        jnp.where(value == green, 2.0 + (blue - red) / safe_chroma, 4.0 + (red - green) / safe_chroma),
    )
    hue = jnp.floor(jnp.mod(sextant / 6.0, 1.0) * 255.0) + jnp.trunc(shift * 255.0)
    saturation = jnp.floor(255.0 * chroma / jnp.maximum(value, 1.0)) / 255.0
    turned = jnp.mod(hue, 256.0) * (6.0 / 255.0)
    # The hexagonal form of HSV to RGB: each channel is the value less a trapezoid of the hue's distance.
    k = jnp.mod(jnp.array([5.0, 3.0, 1.0])[:, None, None] + turned, 6.0)
    return value * (1.0 - saturation * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0))


def grayscale(patch: Patch) -> Patch:
    """Three equal channels of the patch's brightness."""
    return jnp.broadcast_to(luma(patch), patch.shape)


def gaussian_blur(patch: Patch, sigma: Scalar) -> Patch:
    """Blur of standard deviation `sigma` pixels as PIL approximates a Gaussian; 0 changes nothing."""
    rows, columns = (_blur_matrix(side, sigma) for side in patch.shape[1:])
    return apply_to_axes(patch, rows, columns)


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
