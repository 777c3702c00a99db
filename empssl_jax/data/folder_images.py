"""Folders of image files, with or without a subfolder for each class, with or without a folder of test images."""

import contextlib
import filecmp
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from empssl_jax.config import DataConfig
from empssl_jax.config.errors import UserError, one_line
from empssl_jax.data.decoded_images import NO_LABEL, Example, Images, Source, load_images

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
TEST_SPLITS = ("test", "validation", "val")
READ_FILES, READ_BYTES = 100, 2**20  # for a fingerprint
SHOWN = 20  # files that cannot be decoded; the index of the decoded images lists all of them


class ImageFile(NamedTuple):
    """A file in a folder."""

    name: str  # its path relative to the folder, with slashes
    path: Path
    size: int  # in bytes; -1 if the file is not accessible
    time: int  # of its last change, in nanoseconds; -1 if the file is not accessible


Files = list[ImageFile]


def load_folder(config: DataConfig, split: str, cache_dir: str | None) -> tuple[Images, tuple[str, ...]]:
    """The images of a split, sorted by name, and the names of the classes, if there are classes.

    Args:
        config: its `dataset` is "folder:PATH".
        split: "train" or "test".
        cache_dir: see `load_images`.

    Raises:
        UserError: there is no such folder, or it does not hold images for training and for testing.
    """
    root = Path(os.path.expanduser(config.dataset.removeprefix("folder:")))
    files = _splits(root, config)
    classes = _find_classes(root, config, files["train"])
    labels = _labels(files[split], classes)
    if split == "test" and classes:
        _check_classes(config, files["test"], labels, classes)
    images = load_images(_source(config, root, split, files[split], labels), config.image_size, cache_dir)
    _report_unreadable(config, split, images.unreadable, len(files[split]))
    return images, classes


def folder_fingerprints(config: DataConfig) -> dict[str, str]:
    """A digest of each split's images, by split, wherever the folder is; empty for data sets that are not folders.

    It covers the names and sizes of all files and, of up to a hundred of them, the first megabyte.

    Raises:
        UserError: see `load_folder`.
    """
    root = config.folder
    return {} if root is None else {split: _fingerprint(files) for split, files in _splits(root, config).items()}


def _fingerprint(files: Files) -> str:
    digest = hashlib.sha256()
    for number, file in enumerate(files):
        digest.update(os.fsencode(f"{file.name}\0{file.size}\n"))
        if number % -(-len(files) // READ_FILES) == 0:
            with contextlib.suppress(OSError), file.path.open("rb") as content:  # decoding reports the error
                digest.update(content.read(READ_BYTES))
    return digest.hexdigest()


def list_images(root: Path, option: str = "dataset") -> Files:
    """All image files under a folder, sorted by name. Follows links; skips hidden files and folders.

    Args:
        root: the folder.
        option: the option that named the folder, for the error message.

    Raises:
        UserError: a folder cannot be listed.
    """
    try:
        return sorted(look_at(root, path) for path in _walk(root, frozenset()))
    except OSError as error:
        raise UserError(
            f"--{option}: {error.filename} cannot be listed ({error.strerror}): fix or remove it."
        ) from error


def look_at(root: Path, path: Path) -> ImageFile:
    """The name, size and time of a file under a folder."""
    name = path.relative_to(root).as_posix()
    try:
        status = path.stat()
    except OSError:  # for example a broken link; decoding reports it
        return ImageFile(name, path, -1, -1)
    return ImageFile(name, path, status.st_size, status.st_mtime_ns)


def hold_out(files: Files) -> tuple[Files, Files]:
    """Splits files into nine tenths and a tenth, at least one file: those whose names have the lowest SHA-256."""
    by_digest = sorted(files, key=lambda file: hashlib.sha256(os.fsencode(file.name)).digest())
    tenth = max(1, len(files) // 10)
    return sorted(by_digest[tenth:]), sorted(by_digest[:tenth])


def _walk(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    """The image files under a folder; a link back to a folder above is not followed."""
    here = os.path.realpath(folder)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(Path(entry.path), above | {here})
            elif entry.name.lower().endswith(SUFFIXES) and (entry.is_file() or entry.is_symlink()):  # no pipes
                yield Path(entry.path)


def _splits(root: Path, config: DataConfig) -> dict[str, Files]:
    """The files for training and for testing."""
    if config.dataset == "folder:" or not os.path.isdir(root):
        raise UserError(
            f"--dataset {config.dataset!r} is not a folder: give folder:PATH, with the path of a folder of images."
        )
    wanted = (config.test_split,) if config.test_split is not None else TEST_SPLITS
    test = next((name for name in wanted if os.path.isdir(root / name)), None)
    if config.test_split is not None and test is None:
        raise UserError(
            f"--test-split is {config.test_split!r}: {root} has no such subfolder, so create it or choose another."
        )
    if os.path.isdir(root / config.train_split):
        train_root = root / config.train_split
    elif config.train_split != DataConfig.train_split or test is not None:
        raise UserError(
            f"--train-split is {config.train_split!r}: {root} has no such subfolder"
            f"{f' beside {test}' if test is not None else ''}, so create it or choose another."
        )
    else:
        train_root = root
    files = list_images(train_root)
    if test is None:
        if len(files) < 2:
            what = "only one image" if files else f"no images ({', '.join(SUFFIXES)})"
            raise UserError(f"--dataset {config.dataset!r} has {what}: give a folder with some to train and test on.")
        return dict(zip(("train", "test"), hold_out(files), strict=True))
    both = {"train": files, "test": list_images(root / test)}
    for name, found in zip((config.train_split, test), both.values(), strict=True):
        if not found:
            raise UserError(f"--dataset {config.dataset!r} has no images ({', '.join(SUFFIXES)}) in {name}/: add some.")
    _check_overlap(config, both)
    return both


def _check_overlap(config: DataConfig, files: dict[str, Files]) -> None:
    """Raises UserError if a training image and a test image have the same name and content."""
    trained = {file.name: file for file in files["train"]}
    for file in files["test"]:
        other = trained.get(file.name)
        if other is not None and other.size == file.size >= 0 and filecmp.cmp(other.path, file.path, shallow=False):
            raise UserError(
                f"--dataset {config.dataset!r} has the same image for training and testing, {one_line(file.name)}: "
                "remove it from one of the two."
            )


def _find_classes(root: Path, config: DataConfig, train: Files) -> tuple[str, ...]:
    """The class names: the labelled split's subfolders that hold images, if there are at least two."""
    names = _class_names(train)
    if len(names) < 2 and config.train_split != DataConfig.train_split and os.path.isdir(root / DataConfig.train_split):
        names = _class_names(list_images(root / DataConfig.train_split))
    return names if len(names) > 1 else ()


def _class_names(files: Files) -> tuple[str, ...]:
    return tuple(sorted({file.name.split("/")[0] for file in files if "/" in file.name}))


def _labels(files: Files, classes: Sequence[str]) -> list[int]:
    """The class of each file, by its first folder; NO_LABEL if there is none."""
    numbers = {name: number for number, name in enumerate(classes)}
    return [numbers.get(file.name.split("/")[0], NO_LABEL) if "/" in file.name else NO_LABEL for file in files]


def _check_classes(config: DataConfig, files: Files, labels: list[int], classes: Sequence[str]) -> None:
    """Raises UserError if test images are in a folder that is not a class."""
    for file, label in zip(files, labels, strict=True):
        if label == NO_LABEL and "/" in file.name:
            raise UserError(
                f"--dataset {config.dataset!r} has test images in a folder {one_line(file.name.split('/')[0])}, but "
                f"its {len(classes)} classes are folders such as {one_line(classes[0])}: use the same names."
            )


def _source(config: DataConfig, root: Path, split: str, files: Files, labels: list[int]) -> Source:
    def read(numbers: range) -> list[Example]:
        return [Example(files[i].path, labels[i], files[i].name) for i in numbers]

    chosen = config.train_split if split == "train" else config.test_split
    digest = hashlib.sha256()
    for file, label in zip(files, labels, strict=True):
        digest.update(os.fsencode(f"{file.name}\0{file.size} {file.time} {label}\n"))
    return Source(
        name=f"{root.name} {split}",
        location=f"{root.resolve()} {split} {chosen}",
        fingerprint=digest.hexdigest(),
        size=len(files),
        read=read,
        strict=config.strict_images,
        remedy="fix or remove the file, or leave out --strict-images",
        memory=0,
    )


def _report_unreadable(config: DataConfig, split: str, unreadable: dict[str, str], size: int) -> None:
    """Lists the skipped files; with --strict-images, raises UserError instead."""
    if not unreadable:
        return
    listed = [f"{one_line(name)} ({reason})" for name, reason in list(unreadable.items())[:SHOWN]]
    if config.strict_images:
        raise UserError(
            f"--strict-images: {len(unreadable)} of {size} {split} images cannot be decoded, for example "
            f"{listed[0]}: fix or remove the files, or leave out --strict-images."
        )
    more = [f"and {len(unreadable) - SHOWN} more"] if len(unreadable) > SHOWN else []
    print(f"skipped {len(unreadable)} of {size} {split} images that cannot be decoded:")
    print("\n".join(f"  {line}" for line in listed + more))
