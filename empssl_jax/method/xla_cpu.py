"""Five computations in the form that XLA's CPU compiler runs fast. Each docstring gives the plain formula it replaces.

Read the functions as their plain formulas: tests/test_xla_cpu.py shows that both agree. A form that is fast on CPU need
not be fast on GPU, so a choice by backend belongs here and nowhere else.

Two more habits serve this compiler where they stand:

- `patches.draw_recipe` and `encoder.init_encoder` draw all their random numbers at once. Each draw is a loop that takes
  XLA a fifth of a second to compile; with a draw for each array, an encoder has 48 loops and takes seven times as long.
- `augmentations.color_jitter` runs its changes in loops. Otherwise XLA merges each blend into every use of it in the
  next one, and so computes it several times; it ignores `jax.lax.optimization_barrier` when it fuses.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Shaped


def sum_pair(
    a: Float[Array, "*shape"], b: Float[Array, "*shape"], axes: tuple[int, ...]
) -> tuple[Float[Array, "*rest"], Float[Array, "*rest"]]:
    """Sums two float32 arrays over axes.

    Plain: `jnp.sum(a, axes), jnp.sum(b, axes)`, and so it is on GPU and TPU. On CPU, one axis at a time, the last one
    first, reads memory in order, which is 2.5 times as fast on a map of 32x32; short sums also keep rounding errors
    small. On an H100, pairs cost the encoder's forward and backward pass of 2,000 patches 26.3 ms, plain sums 22.2 ms.
    """
    if jax.default_backend() != "cpu":
        return jnp.sum(a, axes), jnp.sum(b, axes)
    zero = jnp.float32(0)
    for axis in sorted(axes, reverse=True):
        a, b = jax.lax.reduce((a, b), (zero, zero), _add, (axis,))
    return a, b


def _add(x: tuple[Array, Array], y: tuple[Array, Array]) -> tuple[Array, Array]:
    # A function of the module, which JAX traces once; a lambda in `sum_pair` would be another one in every call.
    return x[0] + y[0], x[1] + y[1]


def norm_pair(a: PyTree[Float[Array, "..."]], b: PyTree[Float[Array, "..."]]) -> tuple[Array, Array]:
    """The Euclidean norms of two trees of float32 arrays with equal shapes.

    Plain: `optax.global_norm(a), optax.global_norm(b)`. The sums of squares are those of `sum_pair`.
    """
    squares = [
        sum_pair(x * x, y * y, tuple(range(x.ndim)))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    norm_a, norm_b = (jnp.sqrt(sum(column)) for column in zip(*squares, strict=True))
    return norm_a, norm_b


def convolution_to_2x2(
    x: Float[Array, "N H W I"], kernel: Float[Array, "3 3 I O"], stride: int
) -> Float[Array, "N 2 2 O"]:
    """A 3x3 convolution, padded by 1, of maps so small that its result is 2x2: H = W = 2 * stride.

    Plain: `jax.lax.conv_general_dilated(x, kernel, (stride, stride), [(1, 1), (1, 1)])` in NHWC. XLA's CPU convolution
    takes 36 times as long on such maps (the last stage at a patch size of 16). As a dense layer from all positions to
    these four, it is one matrix product.
    """
    side = x.shape[1]

    def pad_to_map(position: int) -> tuple[int, int, int]:
        """Zeros before, after and inside the kernel, centred at an output position; negative numbers cut it."""
        before = stride * position - 1
        return before, side - before - 3, 0

    channel = (0, 0, 0)
    at = [
        [jax.lax.pad(kernel, kernel.dtype.type(0), [pad_to_map(i), pad_to_map(j), channel, channel]) for j in (0, 1)]
        for i in (0, 1)
    ]
    return jnp.einsum("nabc,ijabcd->nijd", x, jnp.stack([jnp.stack(row) for row in at]))


def apply_to_axes(
    planes: Float[Array, "C H W"], rows: Float[Array, "I H"], columns: Float[Array, "J W"]
) -> Float[Array, "C I J"]:
    """Multiplies each axis of all planes by a matrix.

    Plain: `jnp.einsum("chw,ih,jw->cij", planes, rows, columns)`, and two products it is on GPU and TPU. For a second
    matrix product, XLA's CPU compiler transposes small planes and back, which takes three times as long as everything
    else; a sum of products avoids this. From 64x64 pixels on, the sum takes twenty times as long as the product. On an
    H200, the sum costs the augmentation of 2,000 patches of 32x32 0.75 ms, the product 0.59 ms.
    """
    wide = jnp.einsum("chw,jw->chj", planes, columns, precision=jax.lax.Precision.HIGHEST)
    if planes.shape[1] > 32 or jax.default_backend() != "cpu":
        return jnp.einsum("chj,ih->cij", wide, rows, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(rows[None, :, :, None] * wide[:, None], axis=2)


def sequential_map(f: Callable[[Array], PyTree], xs: Shaped[Array, "N ..."]) -> PyTree[Shaped[Array, "N ..."]]:
    """A function of each row of `xs`, one after the other.

    Plain: `jax.lax.map(f, xs)`, a loop, and so it is on GPU and TPU. XLA's CPU compiler makes convolutions in a loop
    slow: a train step in two pieces takes 33 times as long. Without the loop, the program grows with N.
    """
    unroll = len(xs) if jax.default_backend() == "cpu" else 1
    return jax.lax.scan(lambda _, x: (None, f(x)), None, xs, unroll=unroll)[1]
