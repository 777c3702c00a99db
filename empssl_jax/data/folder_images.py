"""Folders of image files, with or without a subfolder for each class, with or without a folder of test images."""

import contextlib
import filecmp
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from empssl_jax.config import DataConfig
from empssl_jax.config.errors import UserError, one_line
from empssl_jax.config.options import FOLDER, TRAIN
from empssl_jax.data.decoded_images import NO_LABEL, Example, Images, Source, load_images
from empssl_jax.data.image_files import SUFFIX_LIST, Files, ImageFile, list_images
from empssl_jax.data.split_folders import WHOLE, check_classes, find_split_folders, other_train_folder

READ_FILES, READ_BYTES = 100, 2**20  # for a fingerprint
SHOWN = 20  # files that cannot be decoded; the index of the decoded images lists all of them


def load_folder(config: DataConfig, split: str, cache_dir: str | None) -> tuple[Images, tuple[str, ...]]:
    """The images of a split, sorted by name, and the names of the classes, if there are classes.

    Args:
        config: its `dataset` is "folder:PATH".
        split: "train" or "test".
        cache_dir: see `load_images`.

    Raises:
        UserError: there is no such folder, or it does not hold images for training and for testing.
    """
    root = root_of(config)
    files = _splits(root, config)
    classes = _find_classes(root, config, files["train"])
    if classes:
        _check_classes(config, files["test"], classes)
    labels = _labels(files[split], classes)
    images = load_images(_source(config, root, split, files[split], labels), config.image_size, cache_dir)
    _report_unreadable(config, split, images.unreadable, len(files[split]))
    return images, classes


def folder_fingerprints(config: DataConfig) -> dict[str, str]:
    """A digest of each split's images, by split, wherever the folder is; empty for data sets that are not folders.

    It covers the names and sizes of all files and, of up to a hundred of them, the first megabyte.

    Raises:
        UserError: see `load_folder`.
    """
    if config.folder is None:
        return {}
    return {split: _fingerprint(files) for split, files in _splits(root_of(config), config).items()}


def _fingerprint(files: Files) -> str:
    digest = hashlib.sha256()
    for number, file in enumerate(files):
        digest.update(os.fsencode(f"{file.name}\0{file.size}\n"))
        if number % -(-len(files) // READ_FILES) == 0:
            with contextlib.suppress(OSError), file.path.open("rb") as content:  # decoding reports the error
                digest.update(content.read(READ_BYTES))
    return digest.hexdigest()


def root_of(config: DataConfig) -> Path:
    """The folder of the data set; raises UserError if it does not exist."""
    root = config.folder
    if root is None or config.dataset == FOLDER or not os.path.isdir(root):
        raise UserError(
            f"--dataset {config.dataset!r} is not a folder: give folder:PATH, with the path of a folder of images."
        )
    return root


def hold_out(files: Files) -> tuple[Files, Files]:
    """Splits files into nine tenths and a tenth, at least one file: those whose names have the lowest SHA-256.

    The last file of a class is never held out, so the tenth may be smaller, and empty if each class has one file.
    """
    labels = dict(zip(files, _labels(files, _class_names(files)), strict=True))
    held: set[ImageFile] = set()
    left = Counter(labels.values())
    for file in sorted(files, key=lambda file: hashlib.sha256(os.fsencode(file.name)).digest()):
        if len(held) == max(1, len(files) // 10):
            break
        if labels[file] == NO_LABEL or left[labels[file]] > 1:
            left[labels[file]] -= 1
            held.add(file)
    return sorted(set(files) - held), sorted(held)


def _splits(root: Path, config: DataConfig) -> dict[str, Files]:
    """The files for training and for testing."""
    folders = find_split_folders(config, root)
    files = list_images(root / folders.train)
    if folders.train == WHOLE and config.train_split is None:
        check_classes(config, sorted({name for file in files for name in file.name.split("/")[:-1]}))
    if folders.test is None:
        if len(files) < 2:
            what = "only one image" if files else f"no images ({SUFFIX_LIST})"
            raise UserError(f"--dataset {config.dataset!r} has {what}: give a folder with some to train and test on.")
        trained, held = hold_out(files)
        if not held:
            raise UserError(
                f"--dataset {config.dataset!r} has one image in each class, and none is left to test on: add images, "
                "or a folder of test images."
            )
        return {"train": trained, "test": held}
    both = {"train": files, "test": list_images(root / folders.test)}
    for name, found in zip(folders, both.values(), strict=True):
        if not found:
            raise UserError(f"--dataset {config.dataset!r} has no images ({SUFFIX_LIST}) in {name}/: add some.")
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
    if len(names) < 2 and (other := other_train_folder(config, root)) is not None:
        names = _class_names(list_images(root / other))
    return names if len(names) > 1 else ()


def _class_names(files: Files) -> tuple[str, ...]:
    return tuple(sorted({file.name.split("/")[0] for file in files if "/" in file.name}))


def _labels(files: Files, classes: Sequence[str]) -> list[int]:
    """The class of each file, by its first folder; NO_LABEL if there is none."""
    numbers = {name: number for number, name in enumerate(classes)}
    return [numbers.get(file.name.split("/")[0], NO_LABEL) if "/" in file.name else NO_LABEL for file in files]


def _check_classes(config: DataConfig, files: Files, classes: Sequence[str]) -> None:
    """Raises UserError if test images are in a folder that is not a class."""
    for file, label in zip(files, _labels(files, classes), strict=True):
        if label == NO_LABEL and "/" in file.name:
            raise UserError(
                f"--dataset {config.dataset!r} has test images in a folder {one_line(file.name.split('/')[0])}, but "
                f"its classes are folders such as {one_line(classes[0])}: use the same names."
            )


def _source(config: DataConfig, root: Path, split: str, files: Files, labels: list[int]) -> Source:
    def read(numbers: range) -> list[Example]:
        return [Example(files[i].path, labels[i], files[i].name) for i in numbers]

    chosen = config.train_split or TRAIN if split == "train" else config.test_split
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
