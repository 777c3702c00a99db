"""Whitening of embeddings: without it, the few directions of largest variance decide which images are neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from empssl_jax.evaluation.embeddings import LabelledEmbeddings

SHRINKAGE = 0.1  # kNN accuracy hardly depends on it between 0.03 and 1 (docs/recipe.md)


@jax.jit
def whiten(bank: Float[Array, "N E"], queries: Float[Array, "Q E"]) -> tuple[Float[Array, "N E"], Float[Array, "Q E"]]:
    """Applies one affine map to both sets. The mapped bank has mean 0 and approximately the identity as covariance.

    `SHRINKAGE` times the mean variance is added to the variance of each direction. This limits the amplification of
    directions in which the bank hardly varies, or does not vary at all because it is small. The map depends on neither
    labels nor queries.

    Args:
        bank: embeddings whose mean and covariance are used.
        queries: other embeddings.
    """
    mean = jnp.mean(bank, axis=0, keepdims=True)
    spread = jnp.max(jnp.abs(bank - mean))
    scale = jnp.where(spread > 0, spread, 1.0)  # keeps sums of squares from overflowing or underflowing
    centred = (bank - mean) / scale
    covariance = jnp.einsum("ne,nf->ef", centred, centred, precision=jax.lax.Precision.HIGHEST) / len(bank)
    variance = jnp.where(spread > 0, jnp.trace(covariance) / len(covariance), 1.0)
    factor = jnp.linalg.cholesky(covariance + SHRINKAGE * variance * jnp.eye(len(covariance)))

    def solve(embeddings: Float[Array, "M E"]) -> Float[Array, "M E"]:
        # Cosine similarities depend only on the inverse covariance; Cholesky gives its cheapest square root.
        return jax.scipy.linalg.solve_triangular(factor, ((embeddings - mean) / scale).T, lower=True).T

    return solve(bank), solve(queries)


def whitened(bank: LabelledEmbeddings, queries: LabelledEmbeddings) -> tuple[LabelledEmbeddings, LabelledEmbeddings]:
    """`whiten` of labelled embeddings."""
    white_bank, white_queries = (np.asarray(array) for array in whiten(bank.embeddings, queries.embeddings))
    return bank._replace(embeddings=white_bank), queries._replace(embeddings=white_queries)
