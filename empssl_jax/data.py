"""Data sets: TFDS reads them without TensorFlow, decoded once into memory; Grain orders and batches them."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import grain
import jax
import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, Int32, UInt8
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from empssl_jax.config import DataConfig, UserError, require
from empssl_jax.metrics import image_progress

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
        dataset, ids = _load_tfds(config.dataset, split, data_dir)
    if per_class is None:
        return dataset
    kept = first_of_each_class(dataset.labels, ids, per_class)
    return dataset._replace(images=dataset.images[kept], labels=dataset.labels[kept])


def batches(dataset: ImageDataset, batch_size: int, seed: int, first_step: int, last_step: int) -> Iterator[Batch]:
    """Shuffled batches of the steps from `first_step` up to `last_step`, prefetched by a thread.

    The batch of a step depends only on (seed, step). Each epoch is another permutation and leaves its incomplete last
    batch out.

    Raises:
        UserError: the data set has no full batch.
    """
    steps_per_epoch = count_steps(dataset, batch_size)

    def gather(indices):
        return Batch(dataset.images[indices], indices.astype(np.int32))

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


def _load_tfds(name: str, split: Split, data_dir: str | None) -> tuple[ImageDataset, np.ndarray | None]:
    """A split that TFDS has, and the ids of its images if it gives any."""
    builder = _prepared_builder(name, data_dir)
    if split not in builder.info.splits or not {"image", "label"} <= set(builder.info.features):
        raise UserError(f"--dataset {name!r} has no {split} split with images and labels: choose another data set.")
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    size = builder.info.splits[split].num_examples

    def read(start):
        return [
            (example, _decode(example["image"]))
            for example in source.__getitems__(range(start, min(start + 256, size)))
        ]

    examples = []
    with ThreadPoolExecutor() as threads, image_progress(f"decoding {name} {split}", size) as bar:
        for chunk in threads.map(read, range(0, size, 256)):
            examples.extend(chunk)
            bar.update(len(chunk))
    shapes = {image.shape for _, image in examples}
    if len(shapes) != 1 or len(set(next(iter(shapes))[:2])) != 1:
        raise UserError(
            f"--dataset {name!r} has {split} images of shapes {sorted(shapes)[:3]}: they must be square and alike."
        )
    labels = np.array([example["label"] for example, _ in examples], np.int32)
    ids = np.array([example["id"] for example, _ in examples]) if "id" in builder.info.features else None
    images = np.stack([image for _, image in examples])
    return ImageDataset(images, labels, builder.info.features["label"].num_classes), ids


def _decode(encoded: bytes) -> UInt8[np.ndarray, "H W 3"]:
    return np.asarray(PIL.Image.open(io.BytesIO(encoded)).convert("RGB"))


def _prepared_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """TFDS's builder of a data set that is on disk, downloaded if need be."""
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UserError(f"--dataset {name!r} is not known to TFDS: see tensorflow.org/datasets for names.") from error
    if builder.is_prepared():
        return builder
    folder = builder.data_dir
    print(
        f"{name} is not in {folder}: TFDS downloads it there. With {name} elsewhere on disk, stop and give --data-dir."
    )
    try:
        builder.download_and_prepare()
    except Exception as error:  # TFDS, requests, archives and file systems fail each in their own way
        raise UserError(
            f"{name} is not in {folder} and cannot be downloaded ({type(error).__name__}): give the folder that has it "
            "as --data-dir or $TFDS_DATA_DIR, or try the built-in data with --config configs/digits.py."
        ) from error
    return builder


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
