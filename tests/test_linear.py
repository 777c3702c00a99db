"""The linear classifier, compared with the same SGD in NumPy."""

import jax
import numpy as np
import pytest

from empssl_jax.config import EvaluationConfig
from empssl_jax.evaluation import linear
from empssl_jax.evaluation.embeddings import LabelledEmbeddings
from empssl_jax.runtime.devices import device_mesh

NAMES = ("a", "b", "c", "d", "e", "f")
CLASSES = len(NAMES)


def blobs(size, seed):
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((CLASSES, 8))
    labels = random.integers(0, CLASSES, size)
    embeddings = centres[labels] + random.standard_normal((size, 8))
    return LabelledEmbeddings(np.float32(embeddings), np.int32(labels), NAMES)


def numpy_accuracies(key, train, test, config):
    """Plain SGD in float64: momentum, L2 penalty, mean cross entropy, half cosine by epoch, incomplete last batch."""
    x, y = np.float64(train.embeddings), np.asarray(train.labels)
    start = linear.init(jax.random.fold_in(key, 0), x.shape[1], CLASSES)
    params = [np.float64(start["kernel"]).T, np.float64(start["bias"])]
    momenta = [np.zeros_like(p) for p in params]
    top1 = []
    for epoch in range(config.linear_epochs):
        rate = config.linear_learning_rate * 0.5 * (1 + np.cos(np.pi * epoch / config.linear_epochs))
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch + 1), len(y)))
        for first in range(0, len(y), config.linear_batch_size):
            rows = order[first : first + config.linear_batch_size]
            logits = x[rows] @ params[0] + params[1]
            errors = np.exp(logits - logits.max(1, keepdims=True))
            errors = errors / errors.sum(1, keepdims=True) - np.eye(CLASSES)[y[rows]]
            gradients = [x[rows].T @ errors / len(rows), errors.mean(0)]
            for i in range(2):
                momenta[i] = 0.9 * momenta[i] + gradients[i] + config.linear_weight_decay * params[i]
                params[i] = params[i] - rate * momenta[i]
        logits = np.float64(test.embeddings) @ params[0] + params[1]
        top1.append(np.mean(logits.argmax(1) == np.asarray(test.labels)))
    return np.array(top1)


def test_accuracies_equal_numpys():
    key, train, test = jax.random.key(5), blobs(330, 1), blobs(500, 2)
    config = EvaluationConfig(linear_epochs=5, linear_batch_size=50)
    accuracy = linear.linear_accuracy(key, train, test, config, device_mesh(1))
    np.testing.assert_allclose(accuracy.top1, numpy_accuracies(key, train, test, config), atol=0.0021)
    assert np.all(accuracy.top5 >= accuracy.top1)
    hits = 500 * accuracy.top1
    np.testing.assert_array_equal(np.round(hits) / 500, accuracy.top1)


def test_separable_classes_are_learned():
    labels = np.arange(120, dtype=np.int32) % CLASSES
    split = LabelledEmbeddings(4 * np.eye(CLASSES, dtype=np.float32)[labels], labels, NAMES)
    config = EvaluationConfig(linear_epochs=20, linear_batch_size=1000)
    assert float(
        linear.linear_accuracy(jax.random.key(0), split, split, config, device_mesh(1)).top1[-1]
    ) == pytest.approx(1.0)


def test_a_class_without_training_images_is_not_predicted():
    """Three of six classes are trained on. With six logits, the top five would contain classes that none has taught."""
    labels = np.arange(60, dtype=np.int32) % 3
    train = LabelledEmbeddings(4 * np.eye(CLASSES, dtype=np.float32)[labels], labels, NAMES)
    test = LabelledEmbeddings(train.embeddings[:CLASSES], np.arange(CLASSES, dtype=np.int32), NAMES)
    config = EvaluationConfig(linear_epochs=20, linear_batch_size=1000)
    accuracy = linear.linear_accuracy(jax.random.key(0), train, test, config, device_mesh(1))
    assert (accuracy.top1[-1], accuracy.top5[-1]) == (0.5, 0.5)
