"""Data sets, decoded once into memory; Grain orders and batches them."""

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

from empssl_jax.config import DataConfig, require
from empssl_jax.tfds_images import load_tfds

Split = Literal["train", "test"]
DATA_AXIS = "data"  # the mesh axis that splits the images of a batch over devices


class ImageDataset(NamedTuple):
    """A decoded split."""

    images: UInt8[np.ndarray, "N H W 3"]
    labels: Int32[np.ndarray, " N"]
    num_classes: int


class Batch(NamedTuple):
    """Images of one step and their indices in the data set."""

    images: UInt8[jax.Array | np.ndarray, "B H W 3"]
    indices: Int32[jax.Array | np.ndarray, " B"]


def load(config: DataConfig, split: Split, data_dir: str | None) -> ImageDataset:
    """Decodes a split into memory, with a progress bar.

    Of several processes each decodes it whole: every epoch is another permutation, so that a process needs any image
    sooner or later. What it gathers in a step is only its own part, see `own_rows`.

    Args:
        config: which data set and how much of it.
        split: train or test.
        data_dir: where TFDS looks, and downloads to; None leaves it to TFDS.

    Raises:
        UserError: the data set is unknown, cannot be had, or is not of square colour images with labels.
    """
    per_class = config.images_per_class if split == "train" else config.test_images_per_class
    if config.dataset == "digits":
        dataset, ids = _load_digits(split), None
    else:
        images, labels, ids, num_classes = load_tfds(config.dataset, split, data_dir)
        dataset = ImageDataset(images, labels, num_classes)
    if per_class is None:
        return dataset
    kept = first_of_each_class(dataset.labels, ids, per_class)
    return dataset._replace(images=dataset.images[kept], labels=dataset.labels[kept])


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


def count_steps(dataset: ImageDataset, batch_size: int) -> int:
    """Full batches in an epoch; raises UserError if there is none."""
    remedy = f"there are only {len(dataset.labels)} training images, so give that at most"
    require(batch_size <= len(dataset.labels), "batch_size", batch_size, remedy)
    return len(dataset.labels) // batch_size


def first_of_each_class(labels, ids, per_class) -> Int[np.ndarray, " K"]:
    """Positions, ascending, of the first `per_class` images of each class by id."""
    order = np.arange(len(labels)) if ids is None else np.argsort(ids, kind="stable")
    kept = [order[labels[order] == label][:per_class] for label in np.unique(labels)]
    return np.sort(np.concatenate(kept))


def _load_digits(split: Split) -> ImageDataset:
    """scikit-learn's digits, enlarged to 32x32: 1,437 for training and 360 for testing, stratified."""
    digits, labels = load_digits(return_X_y=True)
    parts = train_test_split(digits.reshape(-1, 8, 8), labels, test_size=360, stratify=labels, random_state=0)
    digits, labels = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    enlarged = [
        PIL.Image.fromarray(np.uint8(digit * 255 / 16)).resize((32, 32), PIL.Image.Resampling.BILINEAR)
        for digit in digits
    ]
    images = np.stack([np.asarray(image.convert("RGB")) for image in enlarged])
    return ImageDataset(images, labels.astype(np.int32), 10)


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
