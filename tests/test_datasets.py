"""Data sets and the order of their images."""

import os
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from empssl_jax.config import DataConfig
from empssl_jax.config.errors import UserError
from empssl_jax.data.batches import count_steps, shuffled_batches
from empssl_jax.data.datasets import first_of_each_class, load_split

DIGITS = DataConfig(dataset="digits")
needs_cifar10 = pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="TFDS_DATA_DIR is not set")


@pytest.fixture(scope="module")
def digits():
    return load_split(DIGITS, "train", None)


def indices_of(dataset, first, last, seed=42, batch_size=100):
    return np.array([batch.indices for batch in shuffled_batches(dataset, batch_size, seed, first, last)])


def test_digits_are_split_once_and_stratified(digits):
    test = load_split(DIGITS, "test", None)
    assert (len(digits.labels), len(test.labels), digits.num_classes) == (1437, 360, 10)
    assert digits.images.shape[1:] == (32, 32, 3)
    assert digits.images.max() == 255
    counts = np.bincount(test.labels)
    assert counts.min() >= 34
    assert counts.max() <= 38


def test_the_batch_of_a_step_does_not_depend_on_where_training_began(digits):
    from_the_start = indices_of(digits, 0, 40)
    np.testing.assert_array_equal(from_the_start[17:], indices_of(digits, 17, 40))


def test_each_epoch_is_a_new_permutation_without_its_incomplete_batch(digits):
    first, second = indices_of(digits, 0, 28).reshape(2, -1)
    assert len(first) == 1400
    assert len(set(first)) == len(set(second)) == 1400
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, indices_of(digits, 0, 14, seed=43).ravel())


def test_batches_hold_the_images_of_their_indices(digits):
    batch = next(shuffled_batches(digits, 8, 0, 0, 1))
    np.testing.assert_array_equal(batch.images, digits.images[batch.indices])


def test_first_of_each_class_follows_the_ids():
    labels = np.array([0, 1, 0, 1, 0, 1])
    ids = np.array([b"f", b"e", b"d", b"c", b"b", b"a"])
    np.testing.assert_array_equal(first_of_each_class(labels, ids, 2), [2, 3, 4, 5])
    np.testing.assert_array_equal(first_of_each_class(labels, None, 2), [0, 1, 2, 3])


def test_a_batch_larger_than_the_data_is_refused(digits):
    with pytest.raises(UserError, match="--batch-size is 1438: that is more than the 1437 training images"):
        count_steps(digits, 1438)


def test_an_unknown_data_set_is_refused(tmp_path):
    with pytest.raises(UserError, match="--dataset 'nonsense' is not known to TFDS"):
        load_split(DataConfig(dataset="nonsense"), "train", str(tmp_path))


def test_a_builder_that_needs_more_of_tensorflow_is_named(tmp_path, monkeypatch):
    def decode(self, **options):
        vars(sys.modules[type(self).__module__])["tf"].io.decode_raw(b"")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", decode)
    with pytest.raises(
        UserError, match=r"--dataset 'cifar10' needs TensorFlow to be prepared .*'decode_raw'.*--data-dir"
    ):
        load_split(DataConfig(dataset="cifar10"), "train", str(tmp_path))


def test_a_failed_download_names_the_folder_and_the_ways_out(tmp_path, monkeypatch, capsys):
    def fail(self, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(UserError, match=r"cannot be downloaded.*--data-dir.*configs/digits\.py") as caught:
        load_split(DataConfig(), "train", str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "TFDS downloads it" in capsys.readouterr().out


@needs_cifar10
def test_cifar10_subset():
    test = load_split(DataConfig(test_images_per_class=100), "test", os.environ["TFDS_DATA_DIR"])
    assert test.images.shape == (1000, 32, 32, 3)
    animals_and_vehicles = "airplane automobile bird cat deer dog frog horse ship truck"
    assert test.class_names == tuple(animals_and_vehicles.split())
    np.testing.assert_array_equal(np.bincount(test.labels), np.full(10, 100))
    assert 110 < test.images.mean() < 130
