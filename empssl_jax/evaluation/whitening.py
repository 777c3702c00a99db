"""Whitening of embeddings: without it, the few directions of largest variance decide which images are neighbours."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from empssl_jax.evaluation.embeddings import LabelledEmbeddings

SHRINKAGE = 0.1  # kNN accuracy hardly depends on it between 0.03 and 1 (docs/recipe.md)
WHITENED_AT_ONCE = 10_000  # images


class Whitening(NamedTuple):
    """An affine map of embeddings; see `learn_whitening`."""

    mean: Float[Array | np.ndarray, "1 E"]
    scale: Float[Array | np.ndarray, ""]  # keeps sums of squares from overflowing or underflowing
    factor: Float[Array | np.ndarray, "E E"]  # of Cholesky, of the scaled covariance with the shrinkage


@jax.jit
def learn_whitening(bank: Float[Array, "N E"]) -> Whitening:
    """The map that gives a bank of embeddings mean 0 and approximately the identity as covariance.

    `SHRINKAGE` times the mean variance is added to the variance of each direction. This limits the amplification of
    directions in which the bank hardly varies, or does not vary at all because it is small.
    """
    mean = jnp.mean(bank, axis=0, keepdims=True)
    spread = jnp.max(jnp.abs(bank - mean))
    scale = jnp.where(spread > 0, spread, 1.0)
    centred = (bank - mean) / scale
    covariance = jnp.einsum("ne,nf->ef", centred, centred, precision=jax.lax.Precision.HIGHEST) / len(bank)
    variance = jnp.where(spread > 0, jnp.trace(covariance) / len(covariance), 1.0)
    return Whitening(mean, scale, jnp.linalg.cholesky(covariance + SHRINKAGE * variance * jnp.eye(len(covariance))))


@jax.jit
def apply_whitening(whitening: Whitening, embeddings: Float[Array, "M E"]) -> Float[Array, "M E"]:
    """The mapped embeddings."""
    # Cosine similarities depend only on the inverse covariance; Cholesky gives its cheapest square root.
    centred = (embeddings - whitening.mean) / whitening.scale
    return jax.scipy.linalg.solve_triangular(whitening.factor, centred.T, lower=True).T


@jax.jit
def without_whitening(
    whitening: Whitening, kernel: Float[Array, "E C"], bias: Float[Array, " C"]
) -> tuple[Float[Array, "E C"], Float[Array, " C"]]:
    """The kernel and bias that give the embeddings the scores that these give to whitened embeddings."""
    plain = jax.scipy.linalg.solve_triangular(whitening.factor, kernel, lower=True, trans=1) / whitening.scale
    return plain, bias - jnp.matmul(whitening.mean[0], plain, precision=jax.lax.Precision.HIGHEST)


def apply_in_parts(
    whitening: Whitening, embeddings: Float[Array | np.ndarray, "N E"], out: Float[np.ndarray, "N E"] | None = None
) -> Float[np.ndarray, "N E"]:
    """`apply_whitening` of any number of embeddings, some at a time to save memory; `out` may be the same array."""
    out = np.empty(embeddings.shape, np.float32) if out is None else out
    for start in range(0, len(embeddings), WHITENED_AT_ONCE):
        part = slice(start, start + WHITENED_AT_ONCE)
        out[part] = apply_whitening(whitening, embeddings[part])
    return out


def whiten(
    bank: Float[Array | np.ndarray, "N E"], queries: Float[Array | np.ndarray, "Q E"]
) -> tuple[Float[np.ndarray, "N E"], Float[np.ndarray, "Q E"]]:
    """Applies the bank's whitening to both sets. It depends on neither labels nor queries."""
    whitening = learn_whitening(bank)
    return apply_in_parts(whitening, bank), apply_in_parts(whitening, queries)


def whitened(bank: LabelledEmbeddings, queries: LabelledEmbeddings) -> tuple[LabelledEmbeddings, LabelledEmbeddings]:
    """Applies the whitening of the bank's images to all embeddings, those of mirrored images too."""
    whitening = learn_whitening(bank.embeddings)

    def mapped(split: LabelledEmbeddings) -> LabelledEmbeddings:
        mirrored = None if split.mirrored is None else apply_in_parts(whitening, split.mirrored)
        return split._replace(embeddings=apply_in_parts(whitening, split.embeddings), mirrored=mirrored)

    return mapped(bank), mapped(queries)
