"""RankMe, the effective rank of embeddings: a measure of their health that needs no labels."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from empssl_jax.data.datasets import spread

EPSILON = 1e-7  # added to each share, as in the paper
MAX_SIDE = 2048  # of the measured matrix; time grows with the cube of its shorter side


class Spectrum(NamedTuple):
    """The singular values of a matrix of embeddings."""

    values: Float[np.ndarray, " R"]  # descending; R is the smaller of `images` and `dimensions`
    images: int
    dimensions: int

    @property
    def effective_rank(self) -> float:
        """The effective rank, see the function of that name."""
        total = self.values.sum()
        if total == 0:
            return 1.0
        shares = self.values / total + EPSILON
        return float(np.exp(-np.sum(shares * np.log(shares))))


def effective_rank(embeddings: Float[np.ndarray, "N E"]) -> float:
    """The effective rank of N embeddings, from 1 to the smaller of N and E.

    It is exp(-sum_k p_k log p_k) with p_k = s_k / sum_j s_j + 1e-7, where s_1, s_2, ... are the singular values of the
    matrix of embeddings, which is not centred (RankMe: Garrido et al. 2023, arXiv 2210.02885). It is n if n singular
    values are equal and the others are 0, and 1 if all embeddings are multiples of one. Rotations and scale do not
    change it.

    If N and E both exceed `MAX_SIDE`, that many evenly spread embeddings are measured. NaN if a value is not finite.
    """
    return spectrum(embeddings).effective_rank


def spectrum(embeddings: Float[np.ndarray, "N E"]) -> Spectrum:
    """The singular values of embeddings, in float64; see `effective_rank` for which embeddings are measured.

    They are square roots of the eigenvalues of the smaller Gram matrix. Those that rounding alone may cause are 0.
    """
    if min(embeddings.shape) > MAX_SIDE:
        embeddings = embeddings[spread(len(embeddings), MAX_SIDE)]
    images, dimensions = embeddings.shape
    if not np.isfinite(embeddings).all():
        return Spectrum(np.full(min(images, dimensions), np.nan), images, dimensions)
    narrow = embeddings if images >= dimensions else embeddings.T
    side = narrow.shape[1]
    gram = np.zeros((side, side))
    for start in range(0, len(narrow), MAX_SIDE):  # in parts: a copy of all in float64 could fill the memory
        part = narrow[start : start + MAX_SIDE].astype(np.float64)
        gram += part.T @ part
    eigenvalues = np.linalg.eigvalsh(gram)[::-1]
    rounding = eigenvalues[0] * len(narrow) * np.finfo(np.float64).eps
    return Spectrum(np.sqrt(np.where(eigenvalues > rounding, eigenvalues, 0.0)), images, dimensions)
