"""Whitening of embeddings, so that the few directions in which images differ most do not decide who is a neighbour."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from empssl_jax.evaluation.embeddings import LabelledEmbeddings

SHRINKAGE = 0.1  # between 0.03 and 1 kNN hardly depends on it (docs/recipe.md)


@jax.jit
def whiten(bank: Float[Array, "N E"], queries: Float[Array, "Q E"]) -> tuple[Float[Array, "N E"], Float[Array, "Q E"]]:
    """Both sets, moved and turned so that the bank has mean 0 and about the identity as its covariance.

    A share of the mean variance is added to the variance of each direction, so that those in which the bank hardly
    varies, or not at all where it is small, are not blown up. Labels play no part, nor do the queries.

    Args:
        bank: embeddings that mean and covariance are taken of.
        queries: others.
    """
    mean = jnp.mean(bank, axis=0, keepdims=True)
    spread = jnp.max(jnp.abs(bank - mean))
    scale = jnp.where(spread > 0, spread, 1.0)  # sums of squares then neither overflow nor vanish
    centred = (bank - mean) / scale
    covariance = jnp.einsum("ne,nf->ef", centred, centred, precision=jax.lax.Precision.HIGHEST) / len(bank)
    variance = jnp.where(spread > 0, jnp.trace(covariance) / len(covariance), 1.0)
    factor = jnp.linalg.cholesky(covariance + SHRINKAGE * variance * jnp.eye(len(covariance)))

    def solve(embeddings):
        # Cosines need the inverse covariance alone, of which the Cholesky factor is the cheapest root.
        return jax.scipy.linalg.solve_triangular(factor, ((embeddings - mean) / scale).T, lower=True).T

    return solve(bank), solve(queries)


def whitened(bank: LabelledEmbeddings, queries: LabelledEmbeddings) -> tuple[LabelledEmbeddings, LabelledEmbeddings]:
    """`whiten` of labelled embeddings."""
    of_bank, of_queries = (np.asarray(array) for array in whiten(bank.embeddings, queries.embeddings))
    return bank._replace(embeddings=of_bank), queries._replace(embeddings=of_queries)
