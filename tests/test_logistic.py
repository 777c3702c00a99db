"""Logistic regression finds scikit-learn's solution, on any number of devices, and chooses its penalty."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from empssl_jax.evaluation import logistic
from empssl_jax.evaluation.embeddings import LabelledEmbeddings
from empssl_jax.evaluation.whitening import SHRINKAGE
from empssl_jax.runtime.devices import device_mesh

NAMES = tuple("0123456789")


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    return pixels.astype(np.float32), labels.astype(np.int32)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_the_solution_is_that_of_scikit_learn(digits, num_devices):
    """Its C divides the penalty by the number of images. Kernels agree up to a shift that is equal for all classes."""
    pixels, labels = digits[0][:301] / 16, digits[1][:301]
    weights = np.arange(301) % 3 > 0
    zeros = {"kernel": np.zeros((64, 10), np.float32), "bias": np.zeros(10, np.float32)}
    mesh = device_mesh(num_devices)
    kernel = logistic.fit(zeros, logistic.to_examples(pixels, labels, weights, mesh), 0.01, mesh)["kernel"].T
    theirs = LogisticRegression(C=1 / (0.01 * weights.sum()), tol=1e-8, max_iter=1000)
    expected = theirs.fit(pixels[weights], labels[weights]).coef_
    centred = [array - np.mean(array, axis=0) for array in (kernel, expected)]
    np.testing.assert_allclose(*centred, atol=0.02 * np.abs(expected).max())


def test_held_out_images_choose_the_penalty(digits):
    """scikit-learn with the same choice among the same penalties has the same accuracy.

    A tenth of each class is held out. The digits are in the order 0 to 9, so every tenth image is often a 9.
    """
    pixels, labels = digits
    bank, test = (LabelledEmbeddings(pixels[rows], labels[rows], NAMES) for rows in (slice(0, 600), slice(600, 1200)))
    ours = logistic.logistic_accuracy(bank, test, device_mesh(1))
    deviation = bank.embeddings.std(axis=0)
    scale = np.where(deviation > 0, deviation, 1)
    x, queries = ((split.embeddings - bank.embeddings.mean(axis=0)) / scale for split in (bank, test))
    held = np.zeros(600, bool)
    held[[row for digit in range(10) for row in np.flatnonzero(bank.labels == digit)][9::10]] = True
    np.testing.assert_allclose(np.bincount(bank.labels[held]), np.bincount(bank.labels) / 10, atol=1)

    def fitted(penalty, rows):
        return LogisticRegression(C=1 / (penalty * rows.sum()), max_iter=5000).fit(x[rows], bank.labels[rows])

    scores = [fitted(penalty, ~held).score(x[held], bank.labels[held]) for penalty in logistic.PENALTIES]
    falls = [number for number in range(1, len(scores)) if scores[number] < scores[number - 1]]
    last = falls[0] - 1 if falls else len(scores) - 1
    assert ours["penalty"] == logistic.PENALTIES[last]
    accuracy = fitted(ours["penalty"], np.ones(600, bool)).score(queries, test.labels)
    assert ours["top1"] == pytest.approx(accuracy, abs=0.01)
    assert ours["top1"] < ours["top5"] <= 1


def test_a_class_without_training_images_is_not_predicted():
    bank = LabelledEmbeddings(np.eye(2, dtype=np.float32).repeat(5, axis=0), np.arange(10, dtype=np.int32) // 5, NAMES)
    test = LabelledEmbeddings(np.eye(2, dtype=np.float32), np.array([0, 7], np.int32), NAMES)
    accuracy = logistic.logistic_accuracy(bank, test, device_mesh(1))
    assert (accuracy["top1"], accuracy["top5"]) == (0.5, 0.5)


def test_a_dimension_that_does_not_vary_in_training_decides_nothing():
    """float32's mean of 60 times 0.1 is not 0.1, which must not make 0.1 and 0.2 thousands of deviations apart."""
    labels = np.arange(60, dtype=np.int32) % 3
    vectors = np.concatenate([np.eye(3, dtype=np.float32)[labels], np.full((60, 1), 0.1, np.float32)], axis=1)
    assert vectors.std(axis=0)[3] > 0
    other = vectors + np.array([[0, 0, 0, 0.1]], np.float32)
    bank, test = (LabelledEmbeddings(array, labels, NAMES[:3]) for array in (vectors, other))
    assert logistic.logistic_accuracy(bank, test, device_mesh(1))["top1"] == 1


def test_the_penalty_on_whitened_embeddings_is_that_of_scikit_learn(digits):
    """Embeddings are standardised and then whitened in float64, by eigenvectors."""
    pixels, labels = digits[0][:600], digits[1][:600]
    fitted = logistic.fit_classifier(LabelledEmbeddings(pixels, labels, NAMES), device_mesh(1), ["whitened"])
    deviation = pixels.std(axis=0)
    x = (np.float64(pixels) - pixels.mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    variances, directions = np.linalg.eigh(np.cov(x.T, bias=True))
    scale = np.abs(x).max()  # the penalty is on the kernel of embeddings whose largest absolute value is 1
    white = x / scale @ directions / np.sqrt(variances / scale**2 + SHRINKAGE * np.mean(variances) / scale**2)
    theirs = LogisticRegression(C=1 / (fitted.penalty * 600), tol=1e-8, max_iter=5000).fit(white, labels)
    logits, expected = fitted.classifier.logits(pixels), theirs.decision_function(white)
    expected -= expected.mean(axis=1, keepdims=True)
    logits -= logits.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(logits, expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("seed", range(3))
def test_held_out_images_choose_between_standardised_and_whitened_embeddings(seed):
    """With seed 0, whitened embeddings are better, with seed 2 the others; with seed 1, both are equally good."""
    random, labels = np.random.default_rng(seed), np.arange(200, dtype=np.int32) % 2
    signs = np.where(labels == 0, -1.0, 1.0)
    noise = random.standard_normal((200, 40))
    bank = LabelledEmbeddings(np.float32(noise + 0.3 * signs[:, None]), labels, NAMES[:2])
    mesh = device_mesh(1)
    fits = [logistic.fit_classifier(bank, mesh, [kernel]) for kernel in ("standardised", "whitened")]
    accuracy = logistic.logistic_accuracy(bank, bank, mesh)
    best = fits[True].held_out_accuracy > fits[False].held_out_accuracy
    assert accuracy["whitened"] == best
    assert accuracy["penalty"] == fits[best].penalty
