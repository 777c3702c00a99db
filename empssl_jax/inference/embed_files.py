"""Embeds image files in parts: an interrupted command resumes, with bit-identical embeddings."""

import dataclasses
import hashlib
import json
import shutil
import sys
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from empssl_jax.config.command_options import EmbedOptions
from empssl_jax.config.errors import UserError, counted, one_line
from empssl_jax.data.decoded_images import VERSION
from empssl_jax.data.decoding import UnreadableError, decode_or_reason
from empssl_jax.data.image_files import Files, list_images, look_at
from empssl_jax.evaluation.embeddings import batch_size_of
from empssl_jax.inference.image_encoder import ImageEncoder, load
from empssl_jax.run_folder.digests import array_digests
from empssl_jax.run_folder.workdir import locked
from empssl_jax.runtime.atomic_write import atomic_write, check_output, write_text
from empssl_jax.runtime.devices import device_mesh
from empssl_jax.runtime.progress import image_progress

BATCHES = 4  # in a part, which is what an interruption loses at most


class Part(NamedTuple):
    """Some consecutive files."""

    embeddings: Float32[np.ndarray, "K E"]  # of the files that could be read
    reasons: Sequence[str]  # for each file: why it could not be read, or ""

    def is_complete(self, most: int) -> bool:
        """Whether it has an embedding for each file that could be read, of at least one file and at most `most`."""
        return 0 < len(self.reasons) <= most and len(self.embeddings) == self.reasons.count("")


def embed_files(options: EmbedOptions) -> None:
    """Embeds all images under a folder, sorted by name, and writes them to one .npz, atomically.

    The position of a file in this order decides its random patches. Files that cannot be decoded are listed and
    skipped.

    Raises:
        UserError: the run, the checkpoint or the folder does not exist, no image can be decoded, one cannot be read
            now, the output is a folder or a device, or an interrupted command for other images, with another encoder or
            with other options left its parts beside the output.
    """
    root, output = Path(options.images), Path(options.output)
    check_output(output)
    files = _find_images(root)
    embedding = dataclasses.asdict(options.embedding)
    encoder = load(options.workdir, options.step, embedding_batch_size=options.embedding_batch_size, **embedding)
    dim = encoder.embed([]).shape[1]  # raises UserError for 0 patches before anything is written
    folder = output.with_name(output.name + ".parts")
    names = [file.name for file in files]
    with locked(folder, "output"):
        _begin(folder, encoder, files)
        parts = _embed_parts(encoder, files, folder, f"embedding {root}")
        reasons = [reason for of_part in parts.values() for reason in of_part]
        kept = [name for name, reason in zip(names, reasons, strict=True) if not reason]
        unreadable = [name for name, reason in zip(names, reasons, strict=True) if reason]
        if kept:
            _join_parts(output, list(parts), dim, kept, unreadable)
        shutil.rmtree(folder)
    _report_unreadable(names, reasons, root)
    print(f"embeddings of {counted(len(kept), 'image')}: {output}")


def _find_images(root: Path) -> Files:
    """All image files under a folder, or the one file that `root` is."""
    if root.is_file():
        return [look_at(root.parent, root)]
    files = list_images(root, "images") if root.is_dir() else []
    if not files:
        raise UserError(f"--images {root} contains no image: give a folder of images, or one image file.")
    return files


def _begin(folder: Path, encoder: ImageEncoder, files: Files) -> None:
    """Records which encoder, options and files the parts belong to; raises UserError if there are parts of others.

    The batch size is not recorded: it changes embeddings by rounding only, and memory may suffice for smaller ones.
    """
    config = encoder.config
    plan = {
        "encoder": array_digests(encoder.state),
        "image_size": encoder.image_size,
        "decoding": VERSION,
        "seed": config.training.seed,
        "patch": repr(config.patches),
        "input": [config.model.input_mean, config.model.input_std],
        "embedding": dataclasses.asdict(config.evaluation.embedding),
        "files": [[file.name, file.size, file.time] for file in files],
    }
    digest = hashlib.sha256(json.dumps(plan).encode()).hexdigest()
    path = folder / "plan"
    if not any(folder.glob("*.npz")):
        write_text(path, digest)
    elif not (path.exists() and path.read_bytes() == digest.encode()):
        raise UserError(
            f"{folder} holds parts of other images, by another encoder or with other options: run the command that "
            "wrote them again, give another --output, or delete that folder."
        )


def _embed_parts(encoder: ImageEncoder, files: Files, folder: Path, title: str) -> dict[Path, Sequence[str]]:
    """The files of all parts, with their reasons. Those in the folder are kept, whatever their sizes."""
    size, start = BATCHES * batch_size_of(encoder.config.evaluation, device_mesh()), 0
    reasons: dict[Path, Sequence[str]] = {}  # and not the embeddings, which may not fit into memory
    with image_progress(title, len(files)) as bar, ThreadPoolExecutor() as threads:
        while start < len(files):
            path = folder / f"{start}.npz"
            part = _load_part(path, len(files) - start)
            if part is None:
                chosen = files[start : start + size]
                read = list(threads.map(lambda file: decode_or_reason(file.path, encoder.image_size), chosen))
                part = _embed_part(encoder, read, start)
                with atomic_write(path) as file:
                    np.savez(file, embeddings=part.embeddings, reasons=np.array(part.reasons))
            reasons[path] = part.reasons
            start += len(part.reasons)
            bar.update(len(part.reasons))
    return reasons


def _embed_part(encoder: ImageEncoder, read: list[UInt8[np.ndarray, "S S 3"] | UnreadableError], start: int) -> Part:
    """Embeds the images among `read`, whose first file has position `start` among all files."""
    images = {start + number: image for number, image in enumerate(read) if not isinstance(image, UnreadableError)}
    embeddings = encoder.embed(list(images.values()), indices=np.array(list(images), np.int32))
    return Part(embeddings, [str(image) if isinstance(image, UnreadableError) else "" for image in read])


def _load_part(path: Path, most: int) -> Part | None:
    """Reads a part of at most `most` files; None if it does not exist or is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            part = Part(arrays["embeddings"], arrays["reasons"].tolist())
            return part if part.is_complete(most) else None
    except Exception:  # numpy, zipfile and zlib raise various exceptions on damaged files
        return None


def _join_parts(output: Path, parts: Sequence[Path], dim: int, kept: list[str], unreadable: list[str]) -> None:
    """Writes what np.savez would, atomically, with the embeddings of one part in memory at a time."""
    header = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": (len(kept), dim)}
    with atomic_write(output) as file, zipfile.ZipFile(file, "w") as archive:
        for name, names in (("files", kept), ("unreadable", unreadable)):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.array(names, np.str_), allow_pickle=False)
        with archive.open("embeddings.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, header)
            for path in parts:
                with np.load(path, allow_pickle=False) as arrays:
                    entry.write(arrays["embeddings"].tobytes())


def _report_unreadable(names: list[str], reasons: list[str], root: Path) -> None:
    """Prints the files that cannot be read, with the reasons; raises UserError if these are all."""
    skipped = [f"{one_line(name)}: {reason}" for name, reason in zip(names, reasons, strict=True) if reason]
    if len(skipped) == len(names):
        found = counted(len(names), "file")
        raise UserError(f"--images {root}: {found}, none of which can be read ({skipped[0]}): give other images.")
    if skipped:
        print(f"skipped {len(skipped)} of {len(names)} files that cannot be read:", *skipped, sep="\n", file=sys.stderr)
