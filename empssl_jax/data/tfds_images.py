"""Images of TFDS data sets, read and, if necessary, prepared without TensorFlow."""

import functools
import glob
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from empssl_jax.config import DataConfig
from empssl_jax.config.errors import UserError, counted, one_line
from empssl_jax.config.options import TRAIN
from empssl_jax.data.decoded_images import NO_LABEL, Example, Images, Source, load_images
from empssl_jax.runtime.distributed import first_process_first

# What `tf.io.gfile` does with local files.
GFILE = SimpleNamespace(
    GFile=open,
    glob=glob.glob,
    listdir=os.listdir,
    exists=os.path.exists,
    isdir=os.path.isdir,
    walk=os.walk,
)


def load_tfds(
    config: DataConfig, split: str, data_dir: str | None, cache_dir: str | None
) -> tuple[Images, tuple[str, ...]]:
    """The images of a split and the names of the classes; no names if the data set has no class labels.

    Args:
        config: which data set, and the size of its images.
        split: "train" or "test".
        data_dir: folder where TFDS looks for data sets and downloads them; None for TFDS's default.
        cache_dir: see `load_images`.

    Raises:
        UserError: the data set is unknown, cannot be downloaded, is damaged, its images are not of 8 bits, or it has
            the same images for training and testing.
    """
    name = config.dataset
    with first_process_first():
        builder = _prepared_builder(name, data_dir)
    split = _find_splits(config, builder.info)[split]
    size = _count(builder.info, name, split)
    class_names = _class_names(builder.info)
    source = Source(
        name=f"{name} {split}",
        location=f"{builder.data_dir} {split}",
        fingerprint=_fingerprint(builder),
        size=size,
        read=_reader(builder, name, split),
        strict=True,
        remedy="prepare the data set again, or choose another",
    )
    images = load_images(source, config.image_size, cache_dir)
    if images.labels.min() < NO_LABEL or images.labels.max() >= len(class_names) > 0:
        raise UserError(
            f"--dataset {name!r} has {split} labels from {images.labels.min()} to {images.labels.max()}, and "
            f"{counted(len(class_names), 'class')} from 0: prepare the data set again, or choose another."
        )
    return images, class_names


def _fingerprint(builder: tfds.core.DatasetBuilder) -> str:
    """Changes with the description of the data set and with the sizes and times of its files."""
    files = sorted((file.name, file.stat().length, file.stat().mtime) for file in builder.data_path.iterdir())
    return f"{builder.info.as_json} {files}"


def _find_splits(config: DataConfig, info: tfds.core.DatasetInfo) -> dict[str, str]:
    """TFDS's names of the splits for training and for testing, which may be slices such as train[:90%].

    Raises:
        UserError: the data set has no such split, or the two share images.
    """
    default = "validation" if "test" not in info.splits and "validation" in info.splits else "test"
    train, test = config.train_split or TRAIN, config.test_split or default
    trained, tested = (_ranges(info, config.dataset, split) for split in (train, test))
    if any(one.overlaps(other) for one in trained for other in tested):
        raise UserError(
            f"--test-split is {test!r}: it shares images with the training split {train!r}, so choose others with "
            "--train-split and --test-split, such as train[:90%] and train[90%:]."
        )
    return {"train": train, "test": test}


class _Range(NamedTuple):
    """Examples in a file."""

    file: str
    first: int
    end: int  # the first that is excluded

    def overlaps(self, other: "_Range") -> bool:
        return self.file == other.file and self.first < other.end and other.first < self.end


def _ranges(info: tfds.core.DatasetInfo, name: str, split: str) -> list[_Range]:
    """Where the examples of a split are; raises UserError if there is no such split."""
    try:
        files = info.splits[split].file_instructions
    except Exception as error:  # TFDS raises various errors for wrong names of splits
        available = ", ".join(info.splits)
        raise UserError(
            f"--dataset {name!r} has no {split} split, only {available}: choose with --train-split and --test-split, "
            "which also take slices such as train[:90%]."
        ) from error
    return [_Range(file.filename, file.skip, file.skip + file.take) for file in files]


def _count(info: tfds.core.DatasetInfo, name: str, split: str) -> int:
    """Number of images in a split; raises UserError unless these are 8-bit images."""
    image = dict(info.features).get("image")
    if not (isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8):
        raise UserError(f"--dataset {name!r} has images of type {image}: choose a data set of 8-bit images.")
    size = info.splits[split].num_examples
    if size == 0:
        raise UserError(f"--dataset {name!r} has no images in its {split} split: choose another data set.")
    return size


def _class_names(info: tfds.core.DatasetInfo) -> tuple[str, ...]:
    label = dict(info.features).get("label")
    return tuple(label.names) if isinstance(label, tfds.features.ClassLabel) and label.num_classes else ()


def _reader(builder: tfds.core.DatasetBuilder, name: str, split: str) -> Callable[[range], list[Example]]:
    """A function that reads a range of a split's examples; it raises UserError if files are damaged."""
    is_labelled = bool(_class_names(builder.info))
    decoders = {"image": tfds.decode.SkipDecoding()}
    source = functools.cache(lambda: builder.as_data_source(split, decoders=decoders))

    def example(features: dict[str, Any]) -> Example:
        identifier = features.get("id")
        label = int(features["label"]) if is_labelled else NO_LABEL
        return Example(features["image"], label, identifier.decode() if isinstance(identifier, bytes) else identifier)

    def read(numbers: range) -> list[Example]:
        try:
            return [example(features) for features in source().__getitems__(numbers)]
        except Exception as error:  # TFDS, array_record and protobuf each raise their own errors for damaged files
            raise UserError(
                f"{name} in {builder.data_dir} cannot be read ({type(error).__name__}: {one_line(error)}): delete that "
                "folder to prepare it again, or give another --data-dir."
            ) from error

    return read


def _prepared_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """TFDS's builder of a data set; downloads the data set if it is not on disk."""
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UserError(f"--dataset {name!r} is not known to TFDS: see tensorflow.org/datasets for names.") from error
    except Exception as error:  # a malformed name, a missing version or config, damaged files
        reason, remedy = f"{type(error).__name__}: {one_line(error)}", "check the name and --data-dir"
        if "tfrecord" in str(error).lower():
            remedy = "its files are for TensorFlow, so give another --data-dir to prepare it there again"
        raise UserError(f"--dataset {name!r} cannot be opened ({reason}): {remedy}.") from error
    if builder.is_prepared():
        return builder
    folder = builder.data_dir
    print(
        f"{name} is not in {folder}: TFDS downloads it there. If {name} is elsewhere on disk, stop and give --data-dir."
    )
    _without_tensorflow(builder)
    try:
        builder.download_and_prepare()
    except Exception as error:  # TFDS, requests, archives and file systems each raise their own errors
        if isinstance(error, AttributeError) and "SimpleNamespace" in str(error):  # of what stands for TensorFlow
            raise UserError(
                f"--dataset {name!r} needs TensorFlow to be prepared ({error}): prepare it where TensorFlow is "
                "installed, as docs/data.md says, and give its folder as --data-dir."
            ) from error
        raise UserError(
            f"{name} is not in {folder} and cannot be downloaded ({type(error).__name__}): give the folder that has it "
            "as --data-dir or $TFDS_DATA_DIR, or try the built-in data with --config configs/digits.py."
        ) from error
    return builder


def _without_tensorflow(builder: tfds.core.DatasetBuilder) -> None:
    """Lets a builder that imports TensorFlow, such as CIFAR-10's, prepare its data without it.

    Python's own functions replace those of `tf.io.gfile` with which the builder's module finds and opens files. PIL,
    instead of TensorFlow, encodes images that the builder yields as arrays.
    """
    module = sys.modules[type(builder).__module__]
    if hasattr(module, "tf"):
        vars(module)["tf"] = SimpleNamespace(io=SimpleNamespace(gfile=GFILE))
    image = dict(builder.info.features).get("image")
    if not (isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8):
        return
    encode = image.encode_example

    def encode_array(example: Any) -> Any:
        if isinstance(example, np.ndarray):
            example = PIL.Image.fromarray(example[..., 0] if example.shape[-1] == 1 else example)
        return encode(example)

    image.encode_example = encode_array
