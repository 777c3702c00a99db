"""Decoded images of a split, in a file that is written once and mapped.

The file is in the cache folder, with an index beside it. The operating system reads and drops its pages as needed, so a
data set may be larger than the memory.
"""

import errno
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int32, Shaped, UInt8

from empssl_jax.config.errors import UserError, counted
from empssl_jax.data.decoding import UnreadableError, decode_or_reason
from empssl_jax.runtime.atomic_write import atomic_write, write_text
from empssl_jax.runtime.compilation import user_cache
from empssl_jax.runtime.cores import usable_cores
from empssl_jax.runtime.file_locks import lock_file
from empssl_jax.runtime.progress import image_progress

VERSION = 3  # increased when the decoding or the format of the files changes
CHUNK = 32  # images that a thread decodes at once
NO_LABEL = -1
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors that more space prevents


class Example(NamedTuple):
    """An encoded image."""

    image: bytes | Path  # the content of a file, or its path
    label: int  # its class, from 0, or NO_LABEL
    id: str | int | None  # its name in the data set; None if images have no names


class Source(NamedTuple):
    """The encoded images of a split."""

    name: str  # for messages
    location: str  # unique among the splits on this machine
    fingerprint: str  # changes when the images change
    size: int  # number of images
    read: Callable[[range], list[Example]]
    strict: bool  # an image that cannot be decoded is an error; otherwise it is skipped
    remedy: str  # for the message of that error


class Images(NamedTuple):
    """The decoded images of a split."""

    images: UInt8[np.ndarray, "N H W 3"]
    labels: Int32[np.ndarray, " N"]
    ids: Shaped[np.ndarray, " N"] | None
    unreadable: dict[str, str]  # the reason for each skipped image, by its id


def load_images(source: Source, side: int | None, cache_dir: str | None) -> Images:
    """The images of a split: decoded now, with a progress bar, or earlier.

    Args:
        source: the encoded images.
        side: resize images to squares of this side in pixels; None keeps their size, and they must be squares of one
            size.
        cache_dir: folder of decoded images; None for the user's cache folder. If there is none either, images stay in
            memory.

    Raises:
        UserError: the images are not squares of one size, none can be decoded, one cannot and the source is strict, one
            cannot be read now, or the cache folder cannot be written to.
    """
    folder, decoded = _entry(source, side, cache_dir), _Decoded(source, side)
    fingerprint = hashlib.sha256(f"{VERSION} {side} {source.fingerprint}".encode()).hexdigest()
    if folder is None:
        return decoded.images(np.stack([decoded.first(), *decoded]))
    if (stored := _open(folder, fingerprint)) is not None:
        return stored
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("a") as lock:
            lock_file(lock, wait=True)  # another process may be writing the same file, so nothing is decoded before
            stored = _open(folder, fingerprint)
            return stored if stored is not None else _write(folder, fingerprint, decoded)
    except OSError as error:
        tenths = math.ceil(decoded.image_bytes * source.size / 1e8)
        is_full = error.errno in FULL and tenths > 0
        space = f"free {tenths / 10} GB for the decoded images of {source.name}, or " * is_full
        reason = error.strerror or error
        raise UserError(
            f"--cache-dir {folder.parent} cannot be written to ({reason}): {space}give another folder."
        ) from error


class _Decoded:
    """Iterates over the images in order, decodes them, and collects their labels and ids."""

    def __init__(self, source: Source, side: int | None):
        self.unreadable: dict[str, str] = {}
        self.image_bytes = 0  # of each decoded image, 0 before the first
        self._examples: list[tuple[int, str | int | None]] = []
        self._source, self._side, self._iterator = source, side, self._decode()

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        return self._iterator

    def first(self) -> UInt8[np.ndarray, "H W 3"]:
        """The first image; raises UserError if none can be decoded."""
        for image in self:
            self.image_bytes = image.nbytes
            return image
        example = "".join(f", for example {name} ({reason})" for name, reason in list(self.unreadable.items())[:1])
        found = counted(self._source.size, "image")
        raise UserError(f"{self._source.name} has {found}, none of which can be decoded{example}: check the files.")

    def images(self, images: np.ndarray) -> Images:
        labels, ids = zip(*self._examples, strict=True)
        names = None if None in ids else np.array(ids)
        return Images(images, np.array(labels, np.int64).astype(np.int32), names, self.unreadable)

    def _decode(self) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        source, number = self._source, 0
        shapes: set[tuple[int, ...]] = set()
        threads = usable_cores()
        chunks = grain.MapDataset.range(0, source.size, CHUNK).map(self._decode_chunk)
        chunks = chunks.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
        with image_progress(f"decoding {source.name}", source.size) as bar:
            for chunk in chunks:
                for example, image in chunk:
                    number += 1
                    if isinstance(image, UnreadableError):
                        self._skip(number - 1 if example.id is None else example.id, image)
                        continue
                    shapes.add(image.shape)
                    check_shapes(shapes, source.name)
                    self._examples.append((example.label, example.id))
                    yield image
                bar.update(len(chunk))

    def _decode_chunk(self, start: int) -> list[tuple[Example, np.ndarray | UnreadableError]]:
        examples = self._source.read(range(start, min(start + CHUNK, self._source.size)))
        return [(example, decode_or_reason(example.image, self._side)) for example in examples]

    def _skip(self, name: str | int, reason: UnreadableError) -> None:
        if self._source.strict:
            where = f"Image {name} of {self._source.name}"
            raise UserError(f"{where} cannot be decoded ({reason}): {self._source.remedy}.") from reason
        self.unreadable[str(name)] = str(reason)


def check_shapes(shapes: set[tuple[int, ...]], name: str) -> None:
    """Raises UserError, which begins with the name, unless all shapes of images are the same square."""
    if len(shapes) > 1 or any(shape[0] != shape[1] for shape in shapes):
        raise UserError(
            f"{name} has images of shapes {sorted(shapes)}: they must be squares of one size, so "
            "give --image-size, the side in pixels to resize them to."
        )


def _entry(source: Source, side: int | None, cache_dir: str | None) -> Path | None:
    """The folder of a split's decoded images, None if there is no cache folder; each image size has its own."""
    if cache_dir is not None:
        root = Path(cache_dir)
    elif (cache := user_cache()) is not None:
        root = cache / "images"
    else:
        return None
    name = re.sub(r"[^\w.-]+", "-", source.name)[-80:].strip("-.")
    return root / f"{name}-{hashlib.sha256(f'{source.location} {side}'.encode()).hexdigest()[:12]}"


def _write(folder: Path, fingerprint: str, decoded: _Decoded) -> Images:
    """Writes the file, then its index, which marks it as complete."""
    first, path = decoded.first(), folder / "images"
    (folder / "index.json").unlink(missing_ok=True)  # it may be that of other images of the same number and size
    with atomic_write(path) as file:
        file.write(first.data)
        for image in decoded:
            file.write(np.ascontiguousarray(image).data)
    done = decoded.images(np.empty((0, *first.shape), np.uint8))
    index = {
        "fingerprint": fingerprint,
        "shape": [len(done.labels), *first.shape],
        "labels": done.labels.tolist(),
        "ids": None if done.ids is None else done.ids.tolist(),
        "unreadable": done.unreadable,
    }
    write_text(folder / "index.json", json.dumps(index))
    stored = _open(folder, fingerprint)
    if stored is None:
        raise UserError(f"--cache-dir {folder.parent} does not keep what is written to it: give another folder.")
    return stored


def _open(folder: Path, fingerprint: str) -> Images | None:
    """The images of a complete file with this fingerprint, None if there is none."""
    try:
        index = json.loads((folder / "index.json").read_bytes())
        shape = tuple(index["shape"])
        if index["fingerprint"] != fingerprint or (folder / "images").stat().st_size != math.prod(shape):
            return None
        mapped = np.memmap(folder / "images", np.uint8, "r", shape=shape)
        ids = None if index["ids"] is None else np.array(index["ids"])
        labels = np.array(index["labels"], np.int32)
        return Images(np.asarray(mapped), labels, ids, dict(index["unreadable"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
