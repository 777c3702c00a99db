"""The changes that augmentation makes to a patch, as PIL and torchvision define them.

Pixels are float32 in [0, 255] and channels come first (3, H, W), so that these operations work on whole planes. Each is
written for one patch and batched by `jax.vmap`.
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
    """Brightness, contrast, saturation and hue, changed in the order of their places."""

    def change_at(place, patch):
        """Makes the change whose place this is; at the hue's place nothing."""
        which = jnp.argmax(places[:3] == place)
        return adjust(patch, which, jnp.where(places[3] == place, 1.0, factors[which]))

    def before_hue(place, patch):
        return jnp.where(place < places[3], change_at(place, patch), patch)

    def after_hue(place, patch):
        return jnp.where(place > places[3], change_at(place, patch), patch)

    # Loops, since XLA would merge a blend into each of the next one's parts and so compute it several times.
    patch = jax.lax.fori_loop(0, 3, before_hue, patch)
    return jax.lax.fori_loop(1, 4, after_hue, adjust_hue(patch, hue_shift))


def adjust(patch: Patch, which: int | Int[Array, ""], factor: Scalar) -> Patch:
    """The patch blended with black (0, brightness), its mean brightness (1, contrast) or its gray (2, saturation)."""
    gray = luma(patch)
    other = jnp.where(which == 2, gray, jnp.where(which == 1, jnp.mean(gray), 0.0))
    return jnp.clip(factor * patch + (1 - factor) * other, 0.0, 255.0)


def luma(patch: Patch) -> Float[Array, "1 H W"]:
    """Brightness as PIL's conversion to L weighs it."""
    return jnp.sum(patch * jnp.array(GRAY_WEIGHTS)[:, None, None], axis=0, keepdims=True)


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
