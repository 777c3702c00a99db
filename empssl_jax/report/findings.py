"""The numbers of the report: what kNN says of each test image, how many dimensions embeddings fill, maps of them."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from empssl_jax.config import EvaluationConfig
from empssl_jax.evaluation.embeddings import Embeddings, LabelledEmbeddings
from empssl_jax.evaluation.knn import knn_scores
from empssl_jax.evaluation.whitening import whitened
from empssl_jax.report.charts import spread

SPECTRUM_IMAGES = 2000  # singular values take cubic time
MAP_IMAGES = 1000  # more would hide each other
MAP_CLASSES = 10  # as many colours as can be told apart
NEIGHBOURS = 8  # shown of an image
EXAMPLES = 6  # images whose neighbours are shown, right and as many wrong


class Neighbours(NamedTuple):
    """The training images nearest to a test image."""

    image: int
    predicted: int
    indices: Int[np.ndarray, " K"]
    similarities: Float[np.ndarray, " K"]  # cosine


class Findings(NamedTuple):
    """All that the report tells of the embeddings."""

    predicted: Int[np.ndarray, " N"]  # class of each test image by kNN
    confusion: Int[np.ndarray, "C C"]  # test images by class and predicted class
    singular_values: Float[np.ndarray, " R"]  # of the centred test embeddings, falling
    spectrum_images: int  # test embeddings that these are of
    effective_rank: float
    map_images: Int[np.ndarray, " M"]  # test images on the maps
    maps: dict[str, Float[np.ndarray, "M 2"]]  # by method; empty if the embeddings are all the same
    right: list[Neighbours]
    wrong: list[Neighbours]

    @property
    def accuracy(self) -> float:
        """Fraction of the test images that kNN puts into their class."""
        return float(np.trace(self.confusion) / self.confusion.sum())


def examine(embeddings: Embeddings, config: EvaluationConfig, seed: int) -> Findings:
    """Examines the embeddings of a run.

    Args:
        embeddings: the bank of kNN, and the test images' embeddings, which are classified and shown.
        config: of kNN.
        seed: for the maps.
    """
    bank, test = embeddings
    num_classes = max(bank.num_classes, test.num_classes)
    if config.whiten:
        bank, test = whitened(bank, test)
    scores = knn_scores(
        jnp.asarray(test.embeddings),
        jnp.asarray(bank.embeddings),
        jnp.asarray(bank.labels),
        num_classes=num_classes,
        num_neighbours=config.num_neighbours,
        temperature=config.temperature,
    )
    predicted = np.argmax(np.asarray(scores), axis=1)
    confusion = np.zeros((num_classes, num_classes), int)
    np.add.at(confusion, (test.labels, predicted), 1)
    measured = test.embeddings[spread(len(test.labels), SPECTRUM_IMAGES)]
    values = singular_values(measured)
    shown = _map_images(test.labels)
    return Findings(
        predicted,
        confusion,
        values,
        len(measured),
        effective_rank(values),
        shown,
        draw_maps(test.embeddings[shown], seed),
        *(find_neighbours(bank, test, predicted, right) for right in (True, False)),
    )


def singular_values(embeddings: Float[np.ndarray, "N E"]) -> Float[np.ndarray, " R"]:
    """Singular values of embeddings about their mean, falling; of N images at most N - 1 are not zero."""
    centred = embeddings - embeddings.mean(axis=0, keepdims=True)
    return np.linalg.svd(centred, compute_uv=False)[: max(1, len(embeddings) - 1)]


def effective_rank(values: Float[np.ndarray, " R"]) -> float:
    """exp of the entropy of the singular values' shares (Roy, Vetterli 2007): R if all are equal, 1 if one is not zero.

    If all are zero it is 1.
    """
    shares = values[values > 0] / values.sum() if values.sum() > 0 else np.ones(1)
    return float(np.exp(-np.sum(shares * np.log(shares))))


def draw_maps(embeddings: Float[np.ndarray, "M E"], seed: int) -> dict[str, Float[np.ndarray, "M 2"]]:
    """Places of embeddings in the plane by PCA, t-SNE and, where it is installed, UMAP.

    Directions count, as for kNN: embeddings are scaled to unit length first. Nothing is drawn of fewer than five
    images, nor of embeddings that are all the same.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    unit = _unit(embeddings)
    if len(unit) < 5 or np.std(unit, axis=0).max() < 1e-6:
        return {}
    few = PCA(min(50, *unit.shape), random_state=seed % 2**32).fit_transform(unit)
    t_sne = TSNE(perplexity=min(30.0, (len(few) - 1) / 3), init="random", random_state=seed % 2**32)
    with threadpool_limits(1, "openmp"):  # its threads wait for each other 1000 times: minutes where cores are busy
        maps = {"PCA": _two_columns(few), "t-SNE": t_sne.fit_transform(few)}
    try:
        import umap
    except ImportError:
        return maps
    reducer = umap.UMAP(n_neighbors=min(15, len(few) - 1), random_state=seed % 2**32)
    return maps | {"UMAP": np.asarray(reducer.fit_transform(few))}


def find_neighbours(
    bank: LabelledEmbeddings, test: LabelledEmbeddings, predicted: Int[np.ndarray, " N"], right: bool
) -> list[Neighbours]:
    """Nearest training images of the first test image of each class that kNN has put right, or wrong.

    Where there are fewer such classes than examples, the next images follow; nothing is chosen by its looks.
    """
    candidates = np.flatnonzero((predicted == test.labels) == right)
    _, first = np.unique(test.labels[candidates], return_index=True)
    order = np.concatenate([np.sort(first), np.setdiff1d(np.arange(len(candidates)), first)]).astype(int)
    chosen = candidates[order[:EXAMPLES]]
    neighbours = _unit(bank.embeddings)
    examples = []
    for image in chosen:
        similarities = neighbours @ _unit(test.embeddings[image])
        nearest = np.argsort(-similarities, kind="stable")[:NEIGHBOURS]
        examples.append(Neighbours(int(image), int(predicted[image]), nearest, similarities[nearest]))
    return examples


def map_classes(labels: Int[np.ndarray, " N"]) -> Int[np.ndarray, " K"]:
    """The classes on the maps: all, or ten that are spread evenly."""
    classes = np.unique(labels)
    return classes[spread(len(classes), MAP_CLASSES)]


def _map_images(labels: Int[np.ndarray, " N"]) -> Int[np.ndarray, " M"]:
    candidates = np.flatnonzero(np.isin(labels, map_classes(labels)))
    return candidates[spread(len(candidates), MAP_IMAGES)]


def _unit(vectors: Float[np.ndarray, "*batch E"]) -> Float[np.ndarray, "*batch E"]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _two_columns(places: Float[np.ndarray, "M K"]) -> Float[np.ndarray, "M 2"]:
    return np.pad(places, ((0, 0), (0, max(0, 2 - places.shape[1]))))[:, :2]


def margin(accuracy: float, num_images: int) -> float:
    """Half the width of the 95 % interval of an accuracy measured on so many images."""
    return 1.96 * math.sqrt(accuracy * (1 - accuracy) / num_images)
