"""Four computations in the form that XLA's CPU compiler runs fast. Each docstring has the plain formula it replaces.

A reader of the method may take the plain formulas for the code: tests show that both agree. What holds for CPU need not
hold for GPU, so a choice by backend belongs here and nowhere else.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def sum_pair(
    a: Float[Array, "*shape"], b: Float[Array, "*shape"], axes: tuple[int, ...]
) -> tuple[Float[Array, "*rest"], Float[Array, "*rest"]]:
    """Sums both arrays over axes, the last one first.

    One axis at a time, because XLA's CPU compiler then walks through memory in order (2.5 times as fast on a map of
    32x32), and because short sums keep rounding errors small.
    """
    zero = jnp.float32(0)
    for axis in sorted(axes, reverse=True):
        a, b = jax.lax.reduce((a, b), (zero, zero), _add, (axis,))
    return a, b


def _add(x, y):  # one function, so that JAX traces it once
    return x[0] + y[0], x[1] + y[1]


def norm_pair(a: PyTree[Float[Array, "..."]], b: PyTree[Float[Array, "..."]]) -> tuple[Array, Array]:
    """The Euclidean norms of two trees of arrays of equal shapes."""
    squares = [
        sum_pair(x * x, y * y, tuple(range(x.ndim)))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    norm_a, norm_b = (jnp.sqrt(sum(column)) for column in zip(*squares, strict=True))
    return norm_a, norm_b


def convolution_to_2x2(
    x: Float[Array, "N H W I"], kernel: Float[Array, "3 3 I O"], stride: int
) -> Float[Array, "N 2 2 O"]:
    """A 3x3 convolution, padded by 1, of maps so small that its result is 2x2.

    Plain: `jax.lax.conv_general_dilated(x, kernel, (stride, stride), [(1, 1), (1, 1)])` in NHWC. XLA's CPU convolution
    takes 36 times as long on such maps (the last stage at a patch size of 16). As a dense layer from all positions to
    these four it is one matrix product.
    """
    side = x.shape[1]

    def reach(position):
        """Distances of the kernel from both edges at an output position; where negative, the kernel is cut."""
        first = stride * position - 1
        return first, side - first - 3, 0

    channel = (0, 0, 0)
    at = [
        [jax.lax.pad(kernel, kernel.dtype.type(0), [reach(i), reach(j), channel, channel]) for j in (0, 1)]
        for i in (0, 1)
    ]
    return jnp.einsum("nabc,ijabcd->nijd", x, jnp.stack([jnp.stack(row) for row in at]))


def apply_to_axes(
    planes: Float[Array, "C H W"], rows: Float[Array, "I H"], columns: Float[Array, "J W"]
) -> Float[Array, "C I J"]:
    """Applies a matrix to each axis of all planes.

    Plain: `jnp.einsum("chw,ih,jw->cij", planes, rows, columns)`. For a second matrix product XLA's CPU compiler
    transposes small planes and back, which takes three times as long as everything else; a sum of products avoids
    that. From 64x64 pixels on, the sum takes twenty times as long as the product.
    """
    wide = jnp.einsum("chw,jw->chj", planes, columns, precision=jax.lax.Precision.HIGHEST)
    if planes.shape[1] > 32:
        return jnp.einsum("chj,ih->cij", wide, rows, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(rows[None, :, :, None] * wide[:, None], axis=2)
