"""Files of embeddings: .npz archives, validated when they are read."""

import hashlib
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped

from empssl_jax.config.errors import UserError, one_line, require
from empssl_jax.data.datasets import SPLITS
from empssl_jax.evaluation.class_names import match_classes
from empssl_jax.evaluation.embeddings import Embeddings, LabelledEmbeddings
from empssl_jax.run_folder.digests import text_digest
from empssl_jax.runtime.atomic_write import atomic_write

MAX_CLASSES = 100_000  # memory use grows with the number of classes
MAX_COMPRESSION = 200  # deflate compresses zeros 1000-fold: without a limit, a small file could fill the memory
UNLIMITED = 2**26  # bytes of an array that may be compressed more: labels in the order of their classes are
KINDS = {"fiu": "real numbers", "iu": "whole numbers", "U": "text (numpy.str_)"}  # by NumPy's codes
REMEDY = "give a folder with train.npz and test.npz, or leave --embeddings out to compute them"


def save_embeddings(path: Path, split: LabelledEmbeddings, origin: str = "") -> None:
    """Writes an .npz atomically, with `embeddings` (N, E) float32, `labels` (N,) int32 and `class_names` (C,).

    It also contains the `names` (N,) of the images if they are the user's files, and `mirrored` (N, E) if mirrored
    images were embedded too. `origin` is a digest of what the embeddings were made of, for `read_origin`.
    """
    arrays: dict[str, Any] = split._asdict() | {"class_names": np.array(split.class_names, np.str_)}
    arrays |= {"origin": np.array([origin], np.str_)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        np.savez(file, **{name: array for name, array in arrays.items() if array is not None})


def files_digest(folder: Path) -> str:
    """SHA-256 of a folder's train.npz and test.npz."""
    digests = []
    for split in SPLITS:
        with (folder / f"{split}.npz").open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return text_digest(dict(zip(SPLITS, digests, strict=True)))


def read_origin(path: Path) -> str:
    """The `origin` that the file was saved with, empty if it has none or cannot be read."""
    origin = _read_text(path, "origin")
    return "" if origin is None or not len(origin) else str(origin[0])


def read_names(path: Path) -> Shaped[np.ndarray, " N"] | None:
    """The names of the image files that the file was saved with, None if it has none or cannot be read."""
    return _read_text(path, "names")


def _read_text(path: Path, name: str) -> Shaped[np.ndarray, " N"] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_array(archive, name, dim=1, kinds="U")
    except Exception:  # numpy, zipfile and zlib raise various exceptions on damaged files
        return None


def load_both_embeddings(folder: Path, with_mirrored: bool = True) -> Embeddings:
    """Reads a folder's train.npz and test.npz, and numbers the classes of both by name, see `match_classes`.

    Those of mirrored images, which may be missing, can be left out.

    Raises:
        UserError: a file cannot be read, or the dimensions or the names of the classes do not fit together.
    """
    bank, test = (read_split(folder / f"{split}.npz", with_mirrored) for split in SPLITS)
    dims = [split.embeddings.shape[1] for split in (bank, test)]
    remedy = f"train.npz and test.npz have dimensions {dims}, give files of the same dimension"
    require(len(set(dims)) == 1, "embeddings", str(folder), remedy)
    for split, other, names in ((bank, test, SPLITS), (test, bank, SPLITS[::-1])):
        if other.class_names and not split.class_names and split.labels.max() >= 0:
            print(f"{names[0]}.npz has no class_names: its labels are the numbers of the classes in {names[1]}.npz")
    return match_classes(bank, test)


def read_split(path: Path, with_mirrored: bool = True) -> LabelledEmbeddings:
    """Reads a file that `save_embeddings` wrote; some or all classes may have no name, and `names` are not read.

    Nothing is unpickled, and no array is read before its header is validated. Embeddings of mirrored images, which may
    be missing, can be left out.

    Raises:
        UserError: the file is missing or damaged, or does not contain embeddings and their labels.
    """
    if not path.is_file():
        raise UserError(f"--embeddings: there is no {path}: {REMEDY}.")
    try:
        with zipfile.ZipFile(path) as archive:
            embeddings = _read_array(archive, "embeddings", dim=2, kinds="fiu")
            labels = _read_array(archive, "labels", dim=1, kinds="iu")
            class_names: list[str] = []
            if "class_names.npy" in archive.namelist():
                class_names = _read_array(archive, "class_names", dim=1, kinds="U")[: MAX_CLASSES + 1].tolist()
            mirrored = None
            if with_mirrored and "mirrored.npy" in archive.namelist():
                mirrored = _read_array(archive, "mirrored", dim=2, kinds="fiu")
    except Exception as error:  # numpy, zipfile and zlib raise various exceptions on damaged files
        raise UserError(f"--embeddings: {path} cannot be read ({one_line(error) or 'damaged'}): {REMEDY}.") from error
    if not (embeddings.size > 0 and labels.shape == embeddings.shape[:1]):
        shapes = f"embeddings of shape {embeddings.shape} and labels of shape {labels.shape}"
        raise UserError(f"--embeddings: {path} has {shapes}: {REMEDY}.")
    lowest, highest = int(labels.min()), max(int(labels.max()), len(class_names) - 1)
    if not (lowest >= -1 and highest < MAX_CLASSES):
        raise UserError(
            f"--embeddings: {path} has labels from {lowest} to {highest}: number the classes from 0 to at most "
            f"{MAX_CLASSES - 1}, and -1 for no label."
        )
    if mirrored is not None:
        if mirrored.shape != embeddings.shape:
            shapes = f"embeddings of shape {embeddings.shape} and mirrored of shape {mirrored.shape}"
            raise UserError(f"--embeddings: {path} has {shapes}: {REMEDY}.")
        mirrored = _to_float32(mirrored, path)
    embeddings = _to_float32(embeddings, path)
    return LabelledEmbeddings(embeddings, labels.astype(np.int32), tuple(class_names), mirrored=mirrored)


def _to_float32(embeddings: np.ndarray, path: Path) -> Float32[np.ndarray, "N E"]:
    """Converts embeddings of a file; raises UserError if they or their squared norms are not finite in float32."""
    with np.errstate(over="ignore"):
        converted = embeddings.astype(np.float32, copy=False)
        if not np.isfinite(np.einsum("ne,ne->n", converted, converted)).all():
            raise UserError(
                f"--embeddings: {path} contains values that are not finite or too large for float32: {REMEDY}."
            )
    return converted


def _read_array(archive: zipfile.ZipFile, name: str, dim: int, kinds: str) -> np.ndarray:
    """Reads an array of an .npz.

    Raises:
        ValueError: its dimensions, type or size are not as expected; raised before memory is allocated for it.
    """
    entry = archive.getinfo(f"{name}.npy")
    if entry.file_size > max(UNLIMITED, MAX_COMPRESSION * entry.compress_size):
        raise ValueError(f"{name} unpacks to more than {MAX_COMPRESSION} times its size")
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        size = entry.file_size - file.tell()
        if len(shape) != dim or dtype.kind not in kinds or dtype.itemsize * math.prod(shape) != size:
            wanted = f"{dim} dimension{'s' * (dim > 1)} of {KINDS[kinds]}"
            raise ValueError(f"{name} has shape {shape}, type {dtype} and {size} bytes instead of {wanted}")
    with archive.open(entry) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
