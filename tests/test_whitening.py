"""Whitening, compared with a float64 oracle, and its properties."""

import numpy as np
import pytest

from empssl_jax.evaluation.whitening import SHRINKAGE, learn_whitening, whiten, without_whitening


def draw(size, seed):
    """Correlated embeddings with directions of very different scales."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(6, 6)) * [10, 3, 1, 0.3, 0.1, 0.01]
    return (rng.normal(size=(size, 6)) @ mixing.T + 5).astype(np.float32)


def inner_products(bank, queries):
    """The inner products of whitened embeddings, from the eigenvectors of the covariance in float64."""
    bank, queries = np.float64(bank), np.float64(queries)
    mean = bank.mean(axis=0)
    variances, directions = np.linalg.eigh(np.cov(bank.T, bias=True))
    root = directions / np.sqrt(variances + SHRINKAGE * variances.mean())
    return ((queries - mean) @ root) @ ((bank - mean) @ root).T


@pytest.mark.parametrize("size", [4, 200])  # fewer images than dimensions, and more
def test_inner_products_are_those_of_an_eigendecomposition(size):
    bank, queries = draw(size, 1), draw(30, 2)
    of_bank, of_queries = whiten(bank, queries)
    np.testing.assert_allclose(of_queries @ of_bank.T, inner_products(bank, queries), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("scale", "offset"), [(1e-12, 0), (1e12, 0), (1, -5)])
def test_scale_and_offset_change_nothing(scale, offset):
    pair = draw(200, 1), draw(30, 2)
    moved = whiten(*(np.float32(scale) * embeddings + offset for embeddings in pair))
    for ours, plain in zip(moved, whiten(*pair), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-3, atol=1e-3)


def test_equal_embeddings_become_zeros():
    bank = np.full((4, 6), 8, np.float32)
    for embeddings in whiten(bank, bank[:1]):
        np.testing.assert_array_equal(embeddings, 0)


def test_queries_change_neither_the_bank_nor_each_other():
    bank, queries = draw(200, 1), draw(30, 2)
    np.testing.assert_array_equal(whiten(bank, queries)[0], whiten(bank, 100 * queries)[0])
    np.testing.assert_allclose(whiten(bank, queries)[1][:5], whiten(bank, queries[:5])[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1, 1e6])
def test_a_classifier_of_whitened_embeddings_is_one_of_the_embeddings(scale):
    bank, queries = scale * draw(200, 1), scale * draw(30, 2)
    rng = np.random.default_rng(3)
    kernel, bias = np.float32(rng.normal(size=(6, 4))), np.float32(rng.normal(size=4))
    plain, offset = without_whitening(learn_whitening(bank), kernel, bias)
    np.testing.assert_allclose(queries @ plain + offset, whiten(bank, queries)[1] @ kernel + bias, atol=1e-3)
