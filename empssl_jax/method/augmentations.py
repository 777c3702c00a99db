"""The augmentations of a patch, as PIL and torchvision define them.

Pixels are float32 in [0, 255]. Channels come first (3, H, W), so each operation works on whole planes. Each function
takes one patch; `jax.vmap` batches them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from empssl_jax.method.xla_cpu import apply_to_axes

Patch = Float[Array, "3 H W"]
Scalar = Float[Array, ""]

GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R 601, PIL's conversion to L


def mirror(patch: Patch) -> Patch:
    """Exchanges left and right."""
    return patch[:, :, ::-1]


def color_jitter(patch: Patch, places: Int[Array, "4"], factors: Float[Array, "3"], hue_shift: Scalar) -> Patch:
    """Changes brightness, contrast, saturation and hue, in the order of their places.

    The hue changes between two loops. The first makes the other changes that come before it, the second those after it.

    Args:
        patch: pixels in [0, 255].
        places: places of brightness, contrast, saturation and hue in the order, 0 (first) to 3 (last).
        factors: of brightness, contrast and saturation; 1 changes nothing.
        hue_shift: fraction of the full circle, in [-0.5, 0.5].
    """

    def change_at(place: Int[Array, ""], patch: Patch) -> Patch:
        """Makes the change that has this place; for the hue's place returns the patch unchanged."""
        which = jnp.argmax(places[:3] == place)
        return adjust(patch, which, jnp.where(places[3] == place, 1.0, factors[which]))

    def before_hue(place: Int[Array, ""], patch: Patch) -> Patch:
        return jnp.where(place < places[3], change_at(place, patch), patch)

    def after_hue(place: Int[Array, ""], patch: Patch) -> Patch:
        return jnp.where(place > places[3], change_at(place, patch), patch)

    patch = jax.lax.fori_loop(0, 3, before_hue, patch)  # a loop: see xla_cpu.py
    return jax.lax.fori_loop(1, 4, after_hue, adjust_hue(patch, hue_shift))


def adjust(patch: Patch, which: int | Int[Array, ""], factor: Scalar) -> Patch:
    """Blends the patch with black (0, brightness), its mean brightness (1, contrast) or its gray (2, saturation)."""
    gray = luma(patch)
    other = jnp.where(which == 2, gray, jnp.where(which == 1, jnp.mean(gray), 0.0))
    return jnp.clip(factor * patch + (1 - factor) * other, 0.0, 255.0)


def luma(patch: Patch) -> Float[Array, "1 H W"]:
    """Brightness, weighted as in PIL's conversion to L."""
    return jnp.sum(patch * jnp.array(GRAY_WEIGHTS)[:, None, None], axis=0, keepdims=True)


def adjust_hue(patch: Patch, shift: Scalar) -> Patch:
    """Shifts the hue by `shift` of the full circle, in [-0.5, 0.5], through PIL's 8-bit HSV with its truncations."""
    red, green, blue = patch
    value = jnp.max(patch, axis=0)
    chroma = value - jnp.min(patch, axis=0)
    is_red, is_green = value == red, value == green
    difference = jnp.where(is_red, green - blue, jnp.where(is_green, blue - red, red - green))
    start = jnp.where(is_red, 0.0, jnp.where(is_green, 2.0, 4.0))
    turn = (start + difference / jnp.where(chroma > 0, chroma, 1.0)) / 6.0
    hue = jnp.floor((turn - jnp.floor(turn)) * 255.0) + jnp.trunc(shift * 255.0)
    saturation = jnp.floor(255.0 * chroma / jnp.maximum(value, 1.0)) / 255.0
    sixths = (hue - 256.0 * jnp.floor(hue / 256.0)) * (6.0 / 255.0)  # PIL's hue is a byte, which wraps at 256
    # HSV to RGB without cases: a channel is the value minus a trapezoid of k, the hue relative to this channel.
    k = jnp.array([5.0, 3.0, 1.0])[:, None, None] + sixths
    k = jnp.where(k >= 6.0, k - 6.0, k)
    return value * (1.0 - saturation * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0))


def grayscale(patch: Patch) -> Patch:
    """Three equal channels, the patch's brightness."""
    return jnp.broadcast_to(luma(patch), patch.shape)


def gaussian_blur(patch: Patch, sigma: Scalar) -> Patch:
    """Blurs by PIL's approximation of a Gaussian of standard deviation `sigma` pixels; 0 changes nothing."""
    return apply_to_axes(patch, *(_blur_matrix(side, sigma) for side in patch.shape[1:]))


def _blur_matrix(side: int, sigma: Scalar) -> Float[Array, "side side"]:
    """The matrix of three successive box filters (Gwosdek et al. 2011) that repeat the edge pixels outwards."""
    variance = sigma**2 / 3
    inner = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * inner + 1) * (inner * (inner + 1) - 3 * variance) / (6 * (variance - (inner + 1) ** 2))
    radius = inner + part  # the box covers 2 inner + 1 pixels, and a part of one more at each end
    steps = jnp.arange(side)[None, :] - jnp.arange(side)[:, None]
    covered = jnp.clip((steps + radius + 1) / (2 * radius + 1), 0.0, 1.0).at[:, -1].set(1.0)
    box = jnp.diff(covered, axis=1, prepend=0.0)
    return jnp.linalg.matrix_power(box, 3)


def solarize(patch: Patch) -> Patch:
    """Inverts pixels of at least 128."""
    return jnp.where(patch >= 128.0, 255.0 - patch, patch)
