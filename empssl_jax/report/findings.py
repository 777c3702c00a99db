"""The numbers of the report: kNN's prediction for each test image, maps and neighbours."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from empssl_jax.config import EvaluationConfig
from empssl_jax.data.datasets import spread
from empssl_jax.evaluation.embeddings import Embeddings, LabelledEmbeddings, labelled
from empssl_jax.evaluation.evaluate import knn_embeddings
from empssl_jax.evaluation.knn import knn_scores

MAP_IMAGES = 1000  # with more, dots would cover each other
MAP_CLASSES = 10  # with more, colours would be hard to distinguish
NEIGHBOURS = 8  # shown for an image
EXAMPLES = 6  # images shown with their neighbours, for each of correct and incorrect predictions


class Neighbours(NamedTuple):
    """The images of the bank nearest to a test image, the nearest first."""

    image: int  # index of the test image
    predicted: int  # its class by kNN
    indices: Int[np.ndarray, " K"]  # of the neighbours in the bank
    similarities: Float[np.ndarray, " K"]  # cosine


class Findings(NamedTuple):
    """What the report shows about the embeddings of images with labels."""

    predicted: Int[np.ndarray, " N"]  # class of each test image by kNN
    confusion: Int[np.ndarray, "C C"]  # number of test images by class and predicted class
    map_images: Int[np.ndarray, " M"]  # indices of the test images on the maps
    maps: dict[str, Float[np.ndarray, "M 2"]]  # by method; empty if all embeddings are equal or there are too few
    right: list[Neighbours]
    wrong: list[Neighbours]

    @property
    def accuracy(self) -> float:
        """Fraction of the test images that kNN classifies correctly."""
        return float(np.trace(self.confusion) / self.confusion.sum())


def examine(embeddings: Embeddings, config: EvaluationConfig, seed: int) -> Findings:
    """Examines the embeddings of a run.

    Args:
        embeddings: embeddings of all images. Labelled test images are classified and shown; indices count only images
            with a label.
        config: the options of kNN and whitening.
        seed: seed of the maps.
    """
    bank, test = knn_embeddings(embeddings, config)
    bank = labelled(bank)
    num_classes = max(bank.num_classes, test.num_classes)
    voters = bank.with_mirrored()
    scores = knn_scores(
        jnp.asarray(test.embeddings),
        jnp.asarray(voters.embeddings),
        jnp.asarray(voters.labels),
        num_classes=num_classes,
        num_neighbours=config.num_neighbours,
        temperature=config.temperature,
    )
    predicted = np.argmax(np.asarray(scores), axis=1)
    confusion = np.zeros((num_classes, num_classes), int)
    np.add.at(confusion, (test.labels, predicted), 1)
    shown, unit_bank = _map_images(test.labels), _unit(bank.embeddings)
    return Findings(
        predicted,
        confusion,
        shown,
        draw_maps(test.embeddings[shown], seed),
        *(find_neighbours(unit_bank, test, predicted, right) for right in (True, False)),
    )


def draw_maps(embeddings: Float[np.ndarray, "M E"], seed: int) -> dict[str, Float[np.ndarray, "M 2"]]:
    """Maps embeddings to the plane with PCA, t-SNE and, if it is installed, UMAP.

    As in kNN, only directions matter: embeddings are normalised first. Fewer than five images have no maps, nor do
    embeddings that are all the same.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    unit = _unit(embeddings)
    if len(unit) < 5 or np.std(unit, axis=0).max() < 1e-6:
        return {}
    few = PCA(min(50, *unit.shape), random_state=seed % 2**32).fit_transform(unit)
    t_sne = TSNE(perplexity=min(30.0, (len(few) - 1) / 3), init="random", random_state=seed % 2**32)
    with threadpool_limits(1, "openmp"):  # threads would synchronise 1000 times, which takes minutes on busy cores
        maps = {"PCA": _two_columns(few), "t-SNE": t_sne.fit_transform(few)}
    try:
        import umap
    except ImportError:
        return maps
    reducer = umap.UMAP(n_neighbors=min(15, len(few) - 1), random_state=seed % 2**32)
    return maps | {"UMAP": np.asarray(reducer.fit_transform(few))}


def find_neighbours(
    unit_bank: Float[np.ndarray, "M E"], test: LabelledEmbeddings, predicted: Int[np.ndarray, " N"], right: bool
) -> list[Neighbours]:
    """Finds the nearest neighbours of the first test images that kNN classifies correctly (`right`) or incorrectly.

    The first such image of each class comes first. If that gives fewer than `EXAMPLES` images, the next ones follow.
    The bank's embeddings have unit length.
    """
    candidates = np.flatnonzero((predicted == test.labels) == right)
    _, first = np.unique(test.labels[candidates], return_index=True)
    order = np.concatenate([np.sort(first), np.setdiff1d(np.arange(len(candidates)), first)]).astype(int)
    chosen = candidates[order[:EXAMPLES]]
    examples = []
    for image in chosen:
        similarities = unit_bank @ _unit(test.embeddings[image])
        nearest = np.argsort(-similarities, kind="stable")[:NEIGHBOURS]
        examples.append(Neighbours(int(image), int(predicted[image]), nearest, similarities[nearest]))
    return examples


def map_classes(labels: Int[np.ndarray, " N"]) -> Int[np.ndarray, " K"]:
    """The classes on the maps: all, or ten evenly spread ones."""
    classes = np.unique(labels)
    return classes[spread(len(classes), MAP_CLASSES)]


def _map_images(labels: Int[np.ndarray, " N"]) -> Int[np.ndarray, " M"]:
    candidates = np.flatnonzero(np.isin(labels, map_classes(labels)))
    return candidates[spread(len(candidates), MAP_IMAGES)]


def _unit(vectors: Float[np.ndarray, "*batch E"]) -> Float[np.ndarray, "*batch E"]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _two_columns(points: Float[np.ndarray, "M K"]) -> Float[np.ndarray, "M 2"]:
    """The first two columns; a missing one is filled with zeros."""
    return np.pad(points, ((0, 0), (0, max(0, 2 - points.shape[1]))))[:, :2]


def margin(accuracy: float, num_images: int) -> float:
    """Half the width of the 95 % confidence interval of an accuracy measured on `num_images` images."""
    return 1.96 * math.sqrt(accuracy * (1 - accuracy) / num_images)
