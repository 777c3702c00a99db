"""JAX's random keys: one for each purpose, derived from the run's seed. Every draw uses a key that comes from these."""

import jax
from jaxtyping import Array, Int, Key


def parameters_key(seed: int | Int[Array, ""]) -> Key[Array, ""]:
    """The key that draws the initial parameters."""
    return jax.random.fold_in(jax.random.key(seed), 0)


def training_patches_key(seed: int | Int[Array, ""], epoch: int | Int[Array, ""]) -> Key[Array, ""]:
    """The key that draws the patches of one epoch, together with each image's index."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), epoch)


def embedding_patches_key(seed: int | Int[Array, ""]) -> Key[Array, ""]:
    """The key that draws the patches averaged into embeddings, together with each image's index."""
    return jax.random.fold_in(jax.random.key(seed), 2)


def classifier_key(seed: int | Int[Array, ""]) -> Key[Array, ""]:
    """The key that draws the linear classifier's weights and the order of its batches."""
    return jax.random.fold_in(jax.random.key(seed), 3)


def label_choice_key(seed: int | Int[Array, ""]) -> Key[Array, ""]:
    """The key that chooses the training images whose labels are used."""
    return jax.random.fold_in(jax.random.key(seed), 4)


def held_out_key(seed: int | Int[Array, ""]) -> Key[Array, ""]:
    """The key that chooses the labelled images that fine-tuning holds out."""
    return jax.random.fold_in(jax.random.key(seed), 5)


def finetuning_order_key(seed: int | Int[Array, ""], epoch: int | Int[Array, ""]) -> Key[Array, ""]:
    """The key that draws the order of the images in one epoch of fine-tuning."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 6), epoch)


def finetuning_crops_key(seed: int | Int[Array, ""], epoch: int | Int[Array, ""]) -> Key[Array, ""]:
    """The key that draws the crops of one epoch of fine-tuning, together with each image's index."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 7), epoch)
