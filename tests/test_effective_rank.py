"""The effective rank: values known by hand, invariances, and the paper's formula with numpy's singular values."""

import numpy as np
import pytest

from empssl_jax.evaluation import effective_rank as module
from empssl_jax.evaluation.effective_rank import effective_rank, spectrum


def by_numpy(embeddings):
    """RankMe as in the paper, by a singular value decomposition in float64."""
    values = np.linalg.svd(np.float64(embeddings), compute_uv=False)
    shares = values / values.sum() + 1e-7
    return np.exp(-sum(share * np.log(share) for share in shares))


def rotation(size, seed=0):
    return np.linalg.qr(np.random.RandomState(seed).standard_normal((size, size)))[0]


def with_values(values, images, dimensions):
    """A matrix with these singular values, between random rotations."""
    middle = np.zeros((images, dimensions))
    np.fill_diagonal(middle[: len(values)], values)
    return np.float32(rotation(images, 1) @ middle @ rotation(dimensions, 2))


@pytest.mark.parametrize("size", [1, 2, 64])
def test_of_the_identity_it_is_the_size(size):
    assert effective_rank(np.eye(size, dtype=np.float32)) == pytest.approx(size, rel=1e-4)


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (1, 5), (5, 1)])
def test_of_multiples_of_one_embedding_it_is_one(shape):
    random = np.random.RandomState(0)
    embeddings = np.outer(random.randint(1, 9, shape[0]), random.randint(1, 9, shape[1]))
    assert effective_rank(np.float32(embeddings)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("shape", [(30, 9), (9, 30)])
def test_of_spectra_with_a_known_entropy(shape):
    # Three equal values count as three; shares 1/2, 1/4 and 1/4 have the entropy 1.5 log 2.
    assert effective_rank(with_values([3.0, 3.0, 3.0], *shape)) == pytest.approx(3, rel=1e-4)
    assert effective_rank(with_values([4.0, 2.0, 2.0], *shape)) == pytest.approx(2**1.5, rel=1e-4)
    np.testing.assert_allclose(spectrum(with_values([4.0, 2.0, 1.0], *shape)).values[:4], [4, 2, 1, 0], atol=1e-5)


def test_of_zeros_it_is_one_and_of_values_that_are_not_finite_unknown():
    assert effective_rank(np.zeros((5, 3), np.float32)) == 1
    assert np.isnan(effective_rank(np.array([[1.0, np.inf], [0.0, 1.0]], np.float32)))


@pytest.mark.parametrize("shape", [(200, 24), (24, 200), (32, 32)])
def test_it_is_that_of_numpy_and_neither_rotation_nor_scale_changes_it(shape):
    embeddings = np.float32(np.abs(np.random.RandomState(3).standard_normal(shape)) ** 3)
    expected = by_numpy(embeddings)
    assert 2 < expected < min(shape) - 1
    assert effective_rank(embeddings) == pytest.approx(expected, rel=1e-5)
    changed = np.float32(1e6 * rotation(shape[0], 4) @ embeddings @ rotation(shape[1], 5))
    assert effective_rank(changed) == pytest.approx(expected, rel=1e-4)


def test_many_long_embeddings_are_sampled_evenly(monkeypatch):
    monkeypatch.setattr(module, "MAX_SIDE", 5)
    embeddings = np.float32(np.random.RandomState(0).standard_normal((13, 8)))
    measured = spectrum(embeddings)
    assert (measured.images, measured.dimensions, len(measured.values)) == (5, 8, 5)
    assert measured.effective_rank == pytest.approx(by_numpy(embeddings[::3]), rel=1e-5)
    few = embeddings[:, :4]  # short embeddings are all measured, in parts
    assert spectrum(few).images == 13
    assert effective_rank(few) == pytest.approx(by_numpy(few), rel=1e-5)
