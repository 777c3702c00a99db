"""Files of embeddings: .npz archives that are checked before they are believed."""

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from empssl_jax.config.errors import UserError, one_line, require
from empssl_jax.data.datasets import SPLITS
from empssl_jax.evaluation.embeddings import Embeddings, LabelledEmbeddings
from empssl_jax.runtime.atomic_write import atomic_write

MAX_CLASSES = 100_000  # memory grows with it
MAX_COMPRESSION = 200  # deflate packs zeros 1000 times: a small file must not fill the memory
REMEDY = "give a folder with train.npz and test.npz, or leave --embeddings out to compute them"


def save_embeddings(path: Path, split: LabelledEmbeddings) -> None:
    """Writes an .npz with `embeddings` (N, E) float32, `labels` (N,) int32 and `class_names` (C,), whole or not at all.

    Where the images are files it also has their `names` (N,).
    """
    arrays: dict[str, Any] = split._asdict() | {"class_names": np.array(split.class_names, np.str_)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        np.savez(file, **{name: array for name, array in arrays.items() if array is not None})


def load_embeddings(path: Path) -> LabelledEmbeddings:
    """Reads what `save_embeddings` wrote; raises UserError if the file is missing, damaged or of something else.

    Nothing is unpickled, and nothing is read before its header says that it fits. Classes that the file has no
    name for are called by their numbers; `names` are not read.
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
    except Exception as error:  # numpy, zipfile and zlib fail each in their own ways on damaged files
        raise UserError(f"--embeddings: {path} cannot be read ({one_line(error) or 'damaged'}): {REMEDY}.") from error
    if not (embeddings.size > 0 and labels.shape == embeddings.shape[:1]):
        raise UserError(f"--embeddings: {path} has embeddings {embeddings.shape} and labels {labels.shape}: {REMEDY}.")
    lowest, highest = int(labels.min()), max(int(labels.max()), len(class_names) - 1)
    if not (lowest >= -1 and highest < MAX_CLASSES):
        raise UserError(
            f"--embeddings: {path} has labels from {lowest} to {highest}: number the classes from 0 to at most "
            f"{MAX_CLASSES - 1}, and -1 for no label."
        )
    with np.errstate(over="ignore"):
        embeddings = embeddings.astype(np.float32)
        if not np.isfinite(np.einsum("ne,ne->n", embeddings, embeddings)).all():
            raise UserError(
                f"--embeddings: {path} holds values that are not finite, or too large for float32: {REMEDY}."
            )
    numbers = map(str, range(len(class_names), highest + 1))
    return LabelledEmbeddings(embeddings, labels.astype(np.int32), (*class_names, *numbers))


def load_both_embeddings(folder: Path) -> Embeddings:
    """The embeddings in a folder's train.npz and test.npz; raises UserError unless both fit together."""
    bank, test = (load_embeddings(folder / f"{split}.npz") for split in SPLITS)
    dims = [split.embeddings.shape[1] for split in (bank, test)]
    require(len(set(dims)) == 1, "embeddings", str(folder), f"its splits have dimensions {dims}, make them equal")
    return Embeddings(bank, test)


def _read_array(archive: zipfile.ZipFile, name: str, dim: int, kinds: str) -> np.ndarray:
    """An array of an .npz; raises ValueError unless it is what was announced, before memory is taken for it."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.file_size > MAX_COMPRESSION * (entry.compress_size + 1000):
        raise ValueError(f"{name} unpacks to more than {MAX_COMPRESSION} times its size")
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        expected = dtype.itemsize * math.prod(shape)
        if len(shape) != dim or dtype.kind not in kinds or expected != entry.file_size - file.tell():
            raise ValueError(f"{name} has shape {shape}, type {dtype} and {entry.file_size - file.tell()} bytes")
    with archive.open(entry) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
