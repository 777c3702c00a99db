"""Images and labels of TFDS data sets, read, decoded and if need be prepared without TensorFlow."""

import io
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from jaxtyping import Int32, Shaped, UInt8

from empssl_jax.checks import UserError, one_line
from empssl_jax.distributed import first_process_first
from empssl_jax.metrics import image_progress


class TfdsImages(NamedTuple):
    """A decoded split."""

    images: UInt8[np.ndarray, "N H W 3"]
    labels: Int32[np.ndarray, " N"]
    ids: Shaped[np.ndarray, " N"] | None  # for data sets that have them
    num_classes: int


def load_tfds(name: str, split: str, data_dir: str | None) -> TfdsImages:
    """Decodes a split into memory, with a progress bar; images of other modes are converted to RGB.

    Raises:
        UserError: the data set is unknown, cannot be had, is damaged, or is not of square 8-bit images with labels.
    """
    with first_process_first():
        builder = _prepared_builder(name, data_dir)
    _check_features(builder.info, name, split)
    size = builder.info.splits[split].num_examples
    try:
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        examples = _read(source, size, f"{name} {split}")
    except UserError:
        raise
    except Exception as error:  # TFDS, array_record and protobuf fail each in their own ways on damaged files
        raise UserError(
            f"{name} in {builder.data_dir} cannot be read ({type(error).__name__}: {one_line(error)}): delete that "
            "folder to prepare it anew, or give another --data-dir."
        ) from error
    images = [image for _, image in examples]
    shapes = sorted({image.shape for image in images})
    if len(shapes) != 1 or shapes[0][0] != shapes[0][1]:
        raise UserError(f"--dataset {name!r} has {split} images of shapes {shapes[:3]}: they must be square and alike.")
    labels = np.array([example["label"] for example, _ in examples], np.int64)
    num_classes = builder.info.features["label"].num_classes
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"--dataset {name!r} has {split} labels from {labels.min()} to {labels.max()}, and {num_classes} classes "
            "from 0: choose a data set whose images all have labels."
        )
    ids = np.array([example["id"] for example, _ in examples]) if "id" in builder.info.features else None
    return TfdsImages(np.stack(images), labels.astype(np.int32), ids, num_classes)


def _check_features(info: tfds.core.DatasetInfo, name: str, split: str) -> None:
    """Refuses what is no data set of 8-bit images with a class each."""
    if split not in info.splits or not {"image", "label"} <= set(info.features):
        raise UserError(f"--dataset {name!r} has no {split} split with images and labels: choose another data set.")
    image, label = info.features["image"], info.features["label"]
    if not (isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8):
        raise UserError(f"--dataset {name!r} has images of type {image}: choose a data set of 8-bit images.")
    if not (isinstance(label, tfds.features.ClassLabel) and label.num_classes):
        raise UserError(f"--dataset {name!r} has labels of type {label}: choose a data set with a class an image.")
    if info.splits[split].num_examples == 0:
        raise UserError(f"--dataset {name!r} has no images in its {split} split: choose another data set.")


def _read(source, size: int, name: str) -> list[tuple[dict, UInt8[np.ndarray, "H W 3"]]]:
    """All examples and their decoded images, in order."""

    def read(start):
        numbers = range(start, min(start + 256, size))
        return [
            (example, _decode(example["image"], number, name))
            for number, example in zip(numbers, source.__getitems__(numbers), strict=True)
        ]

    examples = []
    with ThreadPoolExecutor() as threads, image_progress(f"decoding {name}", size) as bar:
        for chunk in threads.map(read, range(0, size, 256)):
            examples.extend(chunk)
            bar.update(len(chunk))
    return examples


def _decode(encoded: bytes, number: int, name: str) -> UInt8[np.ndarray, "H W 3"]:
    try:
        image: PIL.Image.Image = PIL.Image.open(io.BytesIO(encoded))
        if image.mode[0] in "IF":
            raise ValueError(f"its mode is {image.mode}, not of 8 bits")
        if "transparency" in image.info:
            image = image.convert("RGBA")
        return np.asarray(image.convert("RGB"))
    except Exception as error:  # PIL's decoders fail each in their own ways
        reason = "no known format" if isinstance(error, PIL.UnidentifiedImageError) else one_line(error)
        raise UserError(
            f"Image {number} of {name} cannot be decoded ({reason}): prepare the data set anew, or choose another."
        ) from error


def _prepared_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """TFDS's builder of a data set that is on disk, downloaded if need be."""
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UserError(f"--dataset {name!r} is not known to TFDS: see tensorflow.org/datasets for names.") from error
    except Exception as error:  # a malformed name, a version or config that is not there, damaged files
        reason, remedy = f"{type(error).__name__}: {one_line(error)}", "check the name and --data-dir"
        if "tfrecord" in str(error).lower():
            remedy = "its files are for TensorFlow, so give another --data-dir to prepare it there anew"
        raise UserError(f"--dataset {name!r} cannot be opened ({reason}): {remedy}.") from error
    if builder.is_prepared():
        return builder
    folder = builder.data_dir
    print(
        f"{name} is not in {folder}: TFDS downloads it there. With {name} elsewhere on disk, stop and give --data-dir."
    )
    _without_tensorflow(builder)
    try:
        builder.download_and_prepare()
    except Exception as error:  # TFDS, requests, archives and file systems fail each in their own ways
        raise UserError(
            f"{name} is not in {folder} and cannot be downloaded ({type(error).__name__}): give the folder that has it "
            "as --data-dir or $TFDS_DATA_DIR, or try the built-in data with --config configs/digits.py."
        ) from error
    return builder


def _without_tensorflow(builder: tfds.core.DatasetBuilder) -> None:
    """Readies a builder of TFDS for preparing its data where TensorFlow would be imported, as CIFAR-10's would.

    Its module opens files by `tf.io.gfile.GFile`, in place of which it gets Python's `open`; and it gives images as
    arrays, which PIL then encodes.
    """
    module = sys.modules[type(builder).__module__]
    if hasattr(module, "tf"):
        vars(module)["tf"] = SimpleNamespace(io=SimpleNamespace(gfile=SimpleNamespace(GFile=open)))
    image = dict(builder.info.features).get("image")
    if not (isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8):
        return
    encode = image.encode_example

    def encode_array(example):
        if isinstance(example, np.ndarray):
            example = PIL.Image.fromarray(example[..., 0] if example.shape[-1] == 1 else example)
        return encode(example)

    image.encode_example = encode_array
