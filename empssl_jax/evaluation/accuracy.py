"""Top-1 and top-5 accuracy from the votes of kNN or the logits of a classifier."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from empssl_jax.config.errors import one_line


def top_k_accuracy(votes: Float[Array, "Q C"], labels: Int[Array, " Q"], k: int) -> float:
    """Fraction of queries whose class is among the k with the most votes; in a tie, the lower class number wins.

    A class without a vote is not predicted, even if fewer than k classes have one.
    """
    most, classes = jax.lax.top_k(votes, min(k, votes.shape[1]))
    # The mean is computed in double precision: in float32, 9 of 10 is less than 0.9.
    return float(np.mean(np.asarray(jnp.any((classes == labels[:, None]) & (most > 0), axis=1))))


def classifier_accuracy(
    logits: Float[Array | np.ndarray, "Q C"], labels: Int[np.ndarray, " Q"], train_labels: Int[np.ndarray, " N"]
) -> dict[str, float]:
    """Top-1 and top-5 accuracy of a classifier. Classes without training images are not predicted."""
    has_images = np.isin(np.arange(logits.shape[1]), train_labels)
    votes = np.where(has_images[None, :], logits - np.min(logits, axis=1, keepdims=True) + 1, 0)
    return {f"top{k}": top_k_accuracy(jnp.asarray(votes), jnp.asarray(labels), k) for k in (1, 5)}


def print_unknown_classes(
    train_labels: Int[np.ndarray, " N"], labels: Int[np.ndarray, " Q"], class_names: Sequence[str]
) -> None:
    """Prints how many test images can only be wrong, because no training image has their class, if there are any."""
    wrong = labels[~np.isin(labels, train_labels)]
    if len(wrong):
        example = f"{len(wrong)} of {len(labels)}, such as {one_line(class_names[wrong[0]])}"
        print(f"test images whose class has no training images count as wrong: {example}")
