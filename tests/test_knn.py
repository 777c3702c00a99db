"""Weighted kNN, compared with the reference's numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from empssl_jax.config import EvaluationConfig
from empssl_jax.config.errors import UserError
from empssl_jax.evaluation.accuracy import top_k_accuracy
from empssl_jax.evaluation.embeddings import Embeddings, LabelledEmbeddings
from empssl_jax.evaluation.evaluate import measure_knn
from empssl_jax.evaluation.knn import knn_scores
from empssl_jax.runtime.devices import device_mesh


def scores_of(numbers, **options):
    return knn_scores(
        jnp.asarray(numbers["queries"]),
        jnp.asarray(numbers["bank"]),
        jnp.asarray(numbers["bank_labels"], jnp.int32),
        num_classes=numbers["scores"].shape[1],
        num_neighbours=int(numbers["k"]),
        temperature=float(numbers["temperature"]),
        **options,
    )


@pytest.mark.parametrize("queries_at_once", [7, 256])
def test_golden_scores_and_accuracies(golden, queries_at_once):
    numbers = golden("knn")
    scores = scores_of(numbers, queries_at_once=queries_at_once)
    expected = numbers["scores"]
    # The reference may divide the votes by their sum.
    scale = np.sum(expected, axis=1, keepdims=True) / np.sum(scores, axis=1, keepdims=True)
    np.testing.assert_allclose(scores * scale, expected, rtol=1e-4, atol=1e-5 * expected.max())
    labels = jnp.asarray(numbers["query_labels"], jnp.int32)
    assert top_k_accuracy(scores, labels, 1) == pytest.approx(float(numbers["top1"]), abs=1e-6)
    assert top_k_accuracy(scores, labels, 5) == pytest.approx(float(numbers["top5"]), abs=1e-6)


def test_nine_of_ten_are_nine_tenths():
    # In float32 the mean is below 0.9, and a run would miss a target of 90 %.
    scores = jnp.eye(10)
    assert top_k_accuracy(scores, jnp.arange(10).at[0].set(9), 1) == 0.9


@pytest.mark.parametrize(("classes", "neighbours", "top5"), [(10, 1, 0.1), (10, 5, 0.3), (3, 1, 1 / 3), (3, 5, 2 / 3)])
def test_a_class_without_a_neighbour_is_not_among_the_top_five(classes, neighbours, top5):
    """All queries equal the three images of the last class; the next nearest are the first images of the bank."""
    directions, labels = np.eye(classes, dtype=np.float32), np.arange(classes, dtype=np.int32)
    bank = LabelledEmbeddings(np.tile(directions, (3, 1)), np.tile(labels, 3), tuple("abcdefghij"[:classes]))
    if classes == 3:  # five neighbours: the three, and two of the first class
        bank = bank._replace(embeddings=np.repeat(directions, 3, axis=0), labels=np.repeat(labels, 3))
    test = LabelledEmbeddings(np.tile(directions[-1:], (classes, 1)), labels, bank.class_names)
    accuracy = measure_knn(Embeddings(bank, test), EvaluationConfig(num_neighbours=neighbours), device_mesh(1))
    assert accuracy == pytest.approx({"top1": 1 / classes, "top5": top5})


def test_length_of_embeddings_does_not_matter(golden):
    numbers = golden("knn")
    longer = numbers | {"queries": 3 * numbers["queries"], "bank": 0.1 * numbers["bank"]}
    np.testing.assert_allclose(scores_of(numbers), scores_of(longer), rtol=1e-3)


def test_more_neighbours_than_images_are_refused():
    with pytest.raises(UserError, match="--num-neighbours is 4: that is more than the 3 labelled training images"):
        knn_scores(jnp.eye(3), jnp.eye(3), jnp.arange(3), num_classes=3, num_neighbours=4, temperature=0.1)
