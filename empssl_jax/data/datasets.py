"""Data sets, decoded once; Grain orders and batches them."""

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

import grain
import jax
import numpy as np
import PIL.Image
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, Int32, Shaped, UInt8
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from empssl_jax.config import DataConfig, TrainingConfig
from empssl_jax.config.errors import require
from empssl_jax.data.folder_images import load_folder
from empssl_jax.data.tfds_images import find_test_split, load_tfds

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
DATA_AXIS = "data"  # the mesh axis that splits the images of a batch over devices


class ImageDataset(NamedTuple):
    """A decoded split; the labels number the classes from 0, with -1 for images without a label."""

    images: UInt8[np.ndarray, "N H W 3"]
    labels: Int32[np.ndarray, " N"]
    class_names: tuple[str, ...]  # none if no image has a class
    names: Shaped[np.ndarray, " N"] | None = None  # of the files, if they are files of the user's

    @property
    def num_classes(self) -> int:
        """How many classes there are, also such as no image is in."""
        return len(self.class_names)

    def take(self, rows: Int[np.ndarray, " K"]) -> "ImageDataset":
        """Some of the images."""
        names = None if self.names is None else self.names[rows]
        return ImageDataset(self.images[rows], self.labels[rows], self.class_names, names)


class Batch(NamedTuple):
    """Images of one step and their indices in the data set."""

    images: UInt8[jax.Array | np.ndarray, "B H W 3"]
    indices: Int32[jax.Array | np.ndarray, " B"]


def load(config: DataConfig, split: Split, data_dir: str | None, cache_dir: str | None = None) -> ImageDataset:
    """Decodes a split, with a progress bar, or maps what was decoded before.

    Of several processes each has all images: every epoch is another permutation, so that a process needs any image
    sooner or later. What it gathers in a step is only its own part, see `own_rows`.

    Args:
        config: which data set and how much of it.
        split: train or test, whatever the data set calls them.
        data_dir: where TFDS looks, and downloads to; None leaves it to TFDS.
        cache_dir: where decoded images are kept; None for the user's cache folder.

    Raises:
        UserError: the data set is unknown, cannot be had, is damaged, or does not fit the options.
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

    They are those of the split train if that is another one and none of the training images has a label, else the
    training images.
    """
    if (train.labels >= 0).any() or config.train_split == DataConfig.train_split:
        return train
    labelled = dataclasses.replace(config, train_split=DataConfig.train_split)
    return load(labelled, "train", data_dir, cache_dir)


def _load(config, split, data_dir, cache_dir) -> tuple[ImageDataset, Shaped[np.ndarray, " N"] | None]:
    """All images of a split, and their ids."""
    if config.dataset == "digits":
        return _load_digits(config, split), None
    if config.dataset.startswith("folder:"):
        images, class_names = load_folder(config, split, cache_dir)
        return ImageDataset(images.images, images.labels, class_names, images.ids), images.ids
    name = config.train_split if split == "train" else find_test_split(config, data_dir)
    images, class_names = load_tfds(config, name, data_dir, cache_dir)
    return ImageDataset(images.images, images.labels, class_names), images.ids


def batches(
    dataset: ImageDataset,
    batch_size: int,
    seed: int,
    first_step: int,
    last_step: int,
    rows: Int[np.ndarray, " K"] | slice = slice(None),
) -> Iterator[Batch]:
    """Shuffled batches of the steps from `first_step` up to `last_step`, prefetched by a thread.

    The batch of a step depends only on (seed, step). Each epoch is another permutation and leaves its incomplete last
    batch out.

    Args:
        dataset: what is shuffled.
        batch_size: images in a step.
        seed: decides the order.
        first_step: counted from the start of the run.
        last_step: the first that is left out.
        rows: which images of each batch to gather, see `own_rows`.

    Raises:
        UserError: the data set has no full batch.
    """
    steps_per_epoch = count_steps(dataset, batch_size)

    def gather(indices):
        own = indices[rows]
        return Batch(dataset.images[own], own.astype(np.int32))

    order = grain.MapDataset.range(len(dataset.labels)).shuffle(seed=seed).batch(batch_size, drop_remainder=True)
    steps = order.repeat(-(-last_step // steps_per_epoch)).slice(slice(first_step, last_step)).map(gather)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def placed_batches(
    dataset: ImageDataset, config: TrainingConfig, first_step: int, last_step: int, mesh: Mesh
) -> Iterator[Batch]:
    """The batches of those steps, see `batches`, split over the devices."""
    size = config.batch_size
    for own in batches(dataset, size, config.seed, first_step, last_step, own_rows(mesh, size)):
        yield Batch(*(place_rows(array, mesh, size) for array in own))


def count_steps(dataset: ImageDataset, batch_size: int) -> int:
    """Full batches in an epoch; raises UserError if there is none."""
    remedy = f"there are only {len(dataset.labels)} training images, so give that at most"
    require(batch_size <= len(dataset.labels), "batch_size", batch_size, remedy)
    return len(dataset.labels) // batch_size


def first_of_each_class(labels, ids, per_class) -> Int[np.ndarray, " K"]:
    """Positions, ascending, of the first `per_class` images of each class by id."""
    order = np.arange(len(labels)) if ids is None else np.argsort(ids, kind="stable")
    kept = [order[labels[order] == label][:per_class] for label in np.unique(labels[labels >= 0])]
    return np.sort(np.concatenate(kept))


def _load_digits(config: DataConfig, split: Split) -> ImageDataset:
    """scikit-learn's digits, enlarged to 32x32: 1,437 for training and 360 for testing, stratified."""
    require(config.train_split == "train", "train_split", config.train_split, "digits has only train and test")
    require(config.test_split in (None, "test"), "test_split", config.test_split, "digits has only train and test")
    size = (config.image_size or 32,) * 2
    digits, labels = load_digits(return_X_y=True)
    parts = train_test_split(digits.reshape(-1, 8, 8), labels, test_size=360, stratify=labels, random_state=0)
    digits, labels = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    enlarged = [
        PIL.Image.fromarray(np.uint8(digit * 255 / 16)).resize(size, PIL.Image.Resampling.BILINEAR) for digit in digits
    ]
    images = np.stack([np.asarray(image.convert("RGB")) for image in enlarged])
    return ImageDataset(images, labels.astype(np.int32), tuple("0123456789"))


def device_mesh(num_devices: int | None = None) -> Mesh:
    """All devices, or the first so many, along an axis over which the images of a batch are split."""
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((len(devices),), (DATA_AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def split_images(mesh: Mesh) -> NamedSharding:
    """Each device holds its share of the images."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Each device holds everything."""
    return NamedSharding(mesh, PartitionSpec())


def own_rows(mesh: Mesh, num_rows: int) -> Int[np.ndarray, " K"]:
    """Which rows of an array that is split by `split_images` this process's devices hold, ascending."""
    indices = split_images(mesh).addressable_devices_indices_map((num_rows,)).values()
    return np.unique(np.concatenate([np.arange(num_rows)[index] for index in indices]))


def place_rows(
    own: Shaped[jax.Array | np.ndarray, "K *rest"], mesh: Mesh, num_rows: int
) -> Shaped[jax.Array, "N *rest"]:
    """The array of all processes, split over their devices, from this process's `own_rows` of it."""
    return jax.make_array_from_process_local_data(split_images(mesh), own, (num_rows, *own.shape[1:]))


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process has whole, on the devices; each process sends what its own devices hold."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def fetch(array: jax.Array) -> np.ndarray:
    """The whole of an array that is split over devices, on the host of each process."""
    return multihost_utils.process_allgather(array, tiled=True)
