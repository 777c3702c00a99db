"""TFDS data sets whose splits, sizes and labels differ from CIFAR-10's, prepared by TFDS itself."""

import os

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets import features

from empssl_jax.config import Config, DataConfig, EvaluationConfig, RunConfig
from empssl_jax.config.errors import UserError
from empssl_jax.data import decoded_images
from empssl_jax.data.datasets import load_bank, load_datasets, load_split
from empssl_jax.evaluation.evaluate import check_neighbours


def pixels(number: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.RandomState(number).randint(0, 256, (height, width, 3)).astype(np.uint8)


class TinyStl(tfds.core.GeneratorBasedBuilder):
    """Like stl10: labelled splits and a larger unlabelled one."""

    VERSION = tfds.core.Version("1.0.0")
    SPLITS = {"train": (0, 30), "test": (100, 20), "unlabelled": (200, 50)}  # noqa: RUF012
    LABEL = features.ClassLabel(num_classes=3)
    SIDES = (8, 8)

    def _info(self):
        kinds = {"image": features.Image(shape=(None, None, 3))} | ({"label": self.LABEL} if self.LABEL else {})
        return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(kinds))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.SPLITS}

    def _generate_examples(self, split):
        first, count = self.SPLITS[split]
        for number in range(first, first + count):
            image = pixels(number, *(side + (number % 2) * (side != 8) for side in self.SIDES))
            label = {"label": -1 if split == "unlabelled" else number % 3} if self.LABEL else {}
            yield number, {"image": image} | label


class Unlabelled(TinyStl):
    """Like div2k: images without labels, in a train and a validation split."""

    SPLITS = {"train": (0, 12), "validation": (100, 5)}  # noqa: RUF012
    LABEL = None
    SIDES = (10, 14)


def load(folder, split="train", dataset="tiny_stl", **options):
    return load_split(DataConfig(dataset=dataset, **options), split, str(folder), str(folder / "cache"))


def numbers_of(dataset, numbers):
    """The number of each image of a data set, in order; `numbers` are the candidates."""
    number_of = {pixels(number).tobytes(): number for number in numbers}
    return [number_of[image.tobytes()] for image in dataset.images]


def test_training_uses_the_unlabelled_split_and_evaluation_the_labelled_ones(tmp_path):
    config = DataConfig(dataset="tiny_stl", train_split="unlabelled")
    run = RunConfig(data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    datasets = load_datasets(Config(data=config, run=run))
    check_neighbours(Config(evaluation=EvaluationConfig(num_neighbours=30)), datasets)
    assert sorted(numbers_of(datasets.train, range(200, 250))) == list(range(200, 250))
    assert set(datasets.train.labels.tolist()) == {-1}
    for name, first, count in (("bank", 0, 30), ("test", 100, 20)):
        numbers = numbers_of(getattr(datasets, name), range(first, first + count))
        assert sorted(numbers) == list(range(first, first + count))
        np.testing.assert_array_equal(getattr(datasets, name).labels, np.array(numbers) % 3)
    assert [split.num_classes for split in datasets] == [3, 3, 3]
    with pytest.raises(UserError, match="--num-neighbours is 31: that is more than the 30 labelled training images"):
        check_neighbours(Config(evaluation=EvaluationConfig(num_neighbours=31)), datasets)
    # Nothing is measured without embeddings, and no accuracy without labels to test on.
    check_neighbours(Config(evaluation=EvaluationConfig(num_neighbours=31, valid_patches=0)), datasets)
    unlabelled = datasets._replace(test=datasets.train)
    check_neighbours(Config(evaluation=EvaluationConfig(num_neighbours=31)), unlabelled)


def test_the_bank_is_what_is_trained_on_if_that_has_labels(tmp_path):
    train = load(tmp_path)
    assert load_bank(DataConfig(dataset="tiny_stl"), train, str(tmp_path)) is train


def test_splits_may_be_slices(tmp_path):
    options = {"train_split": "train[:80%]", "test_split": "train[80%:]"}
    train, test = load(tmp_path, **options), load(tmp_path, "test", **options)
    assert [len(train.labels), len(test.labels)] == [24, 6]
    assert sorted(numbers_of(train, range(30)) + numbers_of(test, range(30))) == list(range(30))


SHARED = {
    "a slice of the default training split": {"test_split": "train[80%:]"},
    "overlapping slices": {"train_split": "train[:25]", "test_split": "train[24:]"},
    "the default test split": {"train_split": "test"},
    "a sum of splits": {"train_split": "train+test[:1]"},
    "the labelled images": {"train_split": "unlabelled", "test_split": "train[29:]"},
}


@pytest.mark.parametrize("case", SHARED)
def test_splits_that_share_images_are_refused(case, tmp_path):
    run = RunConfig(data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"^--test-split is '.*': it shares images with the training split '.*', so ch"):
        load_datasets(Config(data=DataConfig(dataset="tiny_stl", **SHARED[case]), run=run))


def test_the_labelled_images_cannot_be_the_test_images_of_a_run_on_unlabelled_ones(tmp_path):
    run = RunConfig(data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    data = DataConfig(dataset="tiny_stl", train_split="unlabelled", test_split="train")
    with pytest.raises(UserError, match=r"^--test-split is 'train': .*from it, since .* 'unlabelled' has no"):
        load_datasets(Config(data=data, run=run))


def test_splits_in_the_same_file_may_leave_images_out(tmp_path):
    options = {"train_split": "train[:10]+unlabelled", "test_split": "train[25:]"}
    assert [len(load(tmp_path, split, **options).labels) for split in ("train", "test")] == [60, 5]


def test_images_without_labels_and_of_any_shape(tmp_path):
    with pytest.raises(UserError, match=r"^unlabelled train has images of shapes .* give --image-size"):
        load(tmp_path, dataset="unlabelled")
    train = load(tmp_path, dataset="unlabelled", image_size=6)
    assert (train.images.shape, train.labels.tolist(), train.num_classes) == ((12, 6, 6, 3), [-1] * 12, 0)
    assert load(tmp_path, "test", dataset="unlabelled", image_size=6).images.shape == (5, 6, 6, 3)
    # The first image has 10x14 pixels. Resizing its middle also uses the pixels beside it, so the two are not equal.
    first = PIL.Image.fromarray(pixels(0, 10, 14)[:, 2:12]).resize((6, 6), PIL.Image.Resampling.BICUBIC)
    assert np.abs(train.images - np.asarray(first, np.float64)).mean(axis=(1, 2, 3)).min() < 4


def test_images_are_decoded_once_unless_a_file_of_the_data_set_changes(tmp_path, monkeypatch):
    for _ in range(2):
        train = load(tmp_path)
        assert isinstance(train.images.base, np.memmap)
        numbers = numbers_of(train, range(30))
        assert sorted(numbers) == list(range(30))
        np.testing.assert_array_equal(train.labels, np.array(numbers) % 3)
        monkeypatch.setattr(decoded_images, "decode_or_reason", lambda *_: np.zeros((8, 8, 3), np.uint8))
    shard = next((tmp_path / "tiny_stl").rglob("*-train.array_record*"))
    os.utime(shard, (1, 1))
    assert not load(tmp_path).images.any()


def test_a_missing_split_is_refused_with_a_list_of_those_that_exist(tmp_path):
    for options in ({"train_split": "all_of_it"}, {"test_split": "validation"}, {"test_split": "train[x"}):
        split = "train" if "train_split" in options else "test"
        with pytest.raises(UserError, match=r"has no .* split, only .*unlabelled.*: choose with --train-split and"):
            load(tmp_path, split, **options)
