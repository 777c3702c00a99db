"""Randomness: one key for each purpose, derived from the run's seed. Nothing is drawn from anything else."""

import jax
from jaxtyping import Array, Int, Key


def parameters_key(seed: int) -> Key[Array, ""]:
    """Draws the initial parameters."""
    return jax.random.fold_in(jax.random.key(seed), 0)


def training_patches_key(seed: int, epoch: int | Int[Array, ""]) -> Key[Array, ""]:
    """Draws the patches of one epoch, together with each image's index."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), epoch)


def embedding_patches_key(seed: int) -> Key[Array, ""]:
    """Draws the patches that embeddings are averaged over, together with each image's index."""
    return jax.random.fold_in(jax.random.key(seed), 2)


def classifier_key(seed: int) -> Key[Array, ""]:
    """Draws the linear classifier's weights and the order of its batches."""
    return jax.random.fold_in(jax.random.key(seed), 3)
