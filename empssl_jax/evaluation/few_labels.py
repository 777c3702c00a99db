"""Chooses a fraction of the labels at random, to measure classifiers that learn from few of them."""

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from empssl_jax.config import EvaluationConfig, LabelConfig
from empssl_jax.evaluation.embeddings import LabelledEmbeddings, labelled
from empssl_jax.method.random_keys import label_choice_key


def random_of_each_class(key: Key[Array, ""], labels: Int[np.ndarray, " N"], fraction: float) -> Int[np.ndarray, " K"]:
    """Ascending indices of a fraction of the labelled images of each class, at least one of each.

    Each labelled image gets a random number, and each class keeps its images with the smallest ones. Therefore a
    fraction is a part of every larger fraction.

    Args:
        key: decides the choice, together with the labels.
        labels: -1 for images without a label, which are never chosen and change nothing.
        fraction: from 0 to 1; each class keeps the nearest whole number of images, but at least one.
    """
    rows = np.flatnonzero(labels >= 0)
    classes, numbers = labels[rows], np.asarray(jax.random.uniform(key, rows.shape))
    order = np.lexsort((numbers, classes))  # class by class
    _, starts, sizes = np.unique(classes[order], return_index=True, return_counts=True)
    kept = np.maximum(1, np.rint(fraction * sizes))
    place_in_class = np.arange(len(order)) - np.repeat(starts, sizes)
    return np.sort(rows[order[place_in_class < np.repeat(kept, sizes)]])


def chosen_rows(labels: Int[np.ndarray, " N"], options: LabelConfig) -> Int[np.ndarray, " K"]:
    """Ascending indices of the labelled images that the options choose."""
    return random_of_each_class(label_choice_key(options.label_seed), labels, options.label_fraction)


def chosen_embeddings(bank: LabelledEmbeddings, options: EvaluationConfig) -> LabelledEmbeddings:
    """The embeddings of the labelled images that the options choose and, with `mirror`, of the same images mirrored."""
    bank = bank.keep_mirrored(options.mirror)
    if options.label_fraction == 1:
        return labelled(bank)  # copies nothing where all images have a label
    return bank.take(chosen_rows(bank.labels, options))
