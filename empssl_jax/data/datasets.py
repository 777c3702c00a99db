"""Data sets as decoded images and labels: TFDS data sets, folders of image files, and scikit-learn's digits."""

import dataclasses
import sys
from typing import Literal, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import Int, Int32, Shaped, UInt8

from empssl_jax.config import Config, DataConfig
from empssl_jax.config.errors import UserError, require
from empssl_jax.config.options import TRAIN

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


class ImageDataset(NamedTuple):
    """A decoded split. Labels number the classes from 0; -1 marks an image without a label."""

    images: UInt8[np.ndarray, "N H W 3"]
    labels: Int32[np.ndarray, " N"]
    class_names: tuple[str, ...]  # empty if no image has a class
    names: Shaped[np.ndarray, " N"] | None = None  # of the files, for a folder of image files

    @property
    def num_classes(self) -> int:
        """Number of classes, including empty ones."""
        return len(self.class_names)

    def take(self, rows: Int[np.ndarray, " K"]) -> "ImageDataset":
        """The images with these indices."""
        names = None if self.names is None else self.names[rows]
        return ImageDataset(self.images[rows], self.labels[rows], self.class_names, names)

    def mirrored(self) -> "ImageDataset":
        """The same images, with left and right exchanged."""
        return self._replace(images=self.images[:, :, ::-1])


class Datasets(NamedTuple):
    """The images of a run."""

    train: ImageDataset  # for training, which ignores the labels
    bank: ImageDataset  # kNN and the linear classifier learn from it: `train`, unless that has no labels
    test: ImageDataset  # kNN and the linear classifier are measured on it

    @property
    def embedded(self) -> tuple[tuple[Split, ImageDataset], ...]:
        """The images that are embedded for evaluation, with the name of their split."""
        return ("train", self.bank), ("test", self.test)


def load_datasets(config: Config) -> Datasets:
    """The images of a run, all of one size; see `load_split` for the errors raised."""
    from empssl_jax.data.decoded_images import check_shapes

    folders = config.run.data_dir, config.run.cache_dir
    train, test = (load_split(config.data, split, *folders) for split in SPLITS)
    datasets = Datasets(train, load_bank(config.data, train, *folders), test)
    check_shapes({split.images.shape[1:] for split in datasets}, f"--dataset {config.data.dataset!r}")
    return datasets


def load_datasets_for_pictures(config: Config) -> Datasets | None:
    """The images of a run, or None after a warning if they are not available."""
    try:
        return load_datasets(config)
    except (UserError, OSError) as error:
        print(f"warning: the report has no pictures because the images are not available: {error}", file=sys.stderr)
        return None


def load_split(config: DataConfig, split: Split, data_dir: str | None, cache_dir: str | None = None) -> ImageDataset:
    """Decodes a split, with a progress bar, or maps the images decoded earlier.

    Every process has all images: each epoch is a new permutation, so any process may need any image. In a step, a
    process gathers only its own part, see `own_rows`.

    Args:
        config: which data set and how much of it.
        split: "train" or "test", whatever the data set calls them.
        data_dir: folder where TFDS looks for data sets and downloads them; None for TFDS's default.
        cache_dir: folder of decoded images; None for the user's cache folder.

    Raises:
        UserError: the data set is unknown, cannot be downloaded, is damaged, or does not match the options.
    """
    per_class = config.images_per_class if split == "train" else config.test_images_per_class
    dataset, ids = _load(config, split, data_dir, cache_dir)
    if per_class is None:
        return dataset
    option = "images_per_class" if split == "train" else "test_images_per_class"
    require(bool((dataset.labels >= 0).any()), option, per_class, f"the {split} images have no labels, so leave it out")
    return dataset.take(first_of_each_class(dataset.labels, ids, per_class))


def load_bank(
    config: DataConfig, train: ImageDataset, data_dir: str | None, cache_dir: str | None = None
) -> ImageDataset:
    """The images that kNN and the linear classifier learn from.

    They are the training images. If none of these has a label and they are from another split than train, they are the
    images of the split train instead.

    Raises:
        UserError: that split is also the test split; see `load_split` for the others.
    """
    if (train.labels >= 0).any() or config.train_split in (None, TRAIN):
        return train
    name: str | None = TRAIN
    if config.folder is not None:
        from empssl_jax.data.folder_images import other_train_folder, root_of

        name = other_train_folder(config, root_of(config))
        if name is None:
            return train
    why = f"kNN and the linear classifier learn from it, since --train-split {config.train_split!r} has no labels"
    require(config.test_split != name, "test_split", config.test_split, f"{why}, so choose another")
    return load_split(dataclasses.replace(config, train_split=name), "train", data_dir, cache_dir)


def _load(
    config: DataConfig, split: Split, data_dir: str | None, cache_dir: str | None
) -> tuple[ImageDataset, Shaped[np.ndarray, " N"] | None]:
    """All images of a split, and their ids."""
    if config.dataset == "digits":
        return _load_digits(config, split), None
    if config.folder is not None:
        from empssl_jax.data.folder_images import load_folder

        images, class_names = load_folder(config, split, cache_dir)
        return ImageDataset(images.images, images.labels, class_names, images.ids), images.ids
    from empssl_jax.data.tfds_images import load_tfds

    images, class_names = load_tfds(config, split, data_dir, cache_dir)
    return ImageDataset(images.images, images.labels, class_names), images.ids


def first_of_each_class(
    labels: Int[np.ndarray, " N"], ids: Shaped[np.ndarray, " N"] | None, per_class: int
) -> Int[np.ndarray, " K"]:
    """Ascending indices of the first `per_class` images of each class, by id or, without ids, by index."""
    order = np.arange(len(labels)) if ids is None else np.argsort(ids, kind="stable")
    kept = [order[labels[order] == label][:per_class] for label in np.unique(labels[labels >= 0])]
    return np.sort(np.concatenate(kept))


def spread(size: int, count: int) -> list[int]:
    """At most `count` evenly spaced integers from 0 to `size` - 1, including both ends."""
    return list(range(size)) if size <= count else np.linspace(0, size - 1, count).round().astype(int).tolist()


def _load_digits(config: DataConfig, split: Split) -> ImageDataset:
    """scikit-learn's digits, enlarged to 32x32 by default: 1,437 for training and 360 for testing, stratified."""
    require(config.train_split in (None, TRAIN), "train_split", config.train_split, "digits has only train and test")
    require(config.test_split in (None, "test"), "test_split", config.test_split, "digits has only train and test")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    size = (config.image_size or 32,) * 2
    digits, labels = load_digits(return_X_y=True)
    parts = train_test_split(digits.reshape(-1, 8, 8), labels, test_size=360, stratify=labels, random_state=0)
    digits, labels = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    enlarged = [
        PIL.Image.fromarray(np.uint8(digit * 255 / 16)).resize(size, PIL.Image.Resampling.BILINEAR) for digit in digits
    ]
    images = np.stack([np.asarray(image.convert("RGB")) for image in enlarged])
    return ImageDataset(images, labels.astype(np.int32), tuple("0123456789"))
