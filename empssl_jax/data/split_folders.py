"""Which subfolders of a folder of images are for training and for testing, by their names."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from empssl_jax.config import DataConfig
from empssl_jax.config.errors import UserError, one_line
from empssl_jax.config.options import TRAIN
from empssl_jax.data.image_files import has_images, listing

WHOLE = "."  # as --train-split: the folder itself, whose subfolders are all classes
VALIDATION = ("validation", "valid", "val", "dev", "eval", "evaluation")
KINDS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
KINDS |= dict.fromkeys(VALIDATION, "validation")
FILLERS = r"(set|split|data|images?|imgs?)+$"  # as in train_set and TestImages


class SplitFolders(NamedTuple):
    """Paths relative to the data set's folder."""

    train: str
    test: str | None  # None: a part of the training images is held out


def find_split_folders(config: DataConfig, root: Path) -> SplitFolders:
    """The folders that the options name, or else those with the usual names, whatever their case.

    Args:
        config: the options.
        root: the data set's folder.

    Raises:
        UserError: a folder does not exist or cannot be listed, or the names are ambiguous.
    """
    named, folders = _named_train_folder(config, root), _subfolders(root)
    if config.test_split is not None and not os.path.isdir(root / config.test_split):
        raise UserError(
            f"--test-split is {config.test_split!r}: {root} has no such subfolder, so create it or choose another."
        )
    train = named or _only(config, [name for name in _of_kind(folders, "train") if name != config.test_split])
    test = config.test_split
    if test is None and named != WHOLE:
        candidates = [name for name in folders if name != train]
        test = _only(config, _of_kind(candidates, "test") or _of_kind(candidates, "validation"))
    if train is None and test is not None:
        raise UserError(
            f"--train-split is {TRAIN!r}: {root} has no such subfolder beside {test}, so create it or choose another; "
            f"if all subfolders are classes, give --train-split {WHOLE} without --test-split."
        )
    if train is None:
        return SplitFolders(WHOLE, None)
    if test is None and named is None:
        with listing("dataset"):
            beside = next((name for name in folders if name != train and has_images(root / name)), None)
        if beside is not None:
            raise _ambiguous(config, f"images in {one_line(train)} and in {one_line(beside)}, but no test folder")
    if test is not None and _overlap(root / train, root / test):
        raise UserError(f"--test-split is {test!r}: it shares images with --train-split {train!r}, so choose another.")
    return SplitFolders(train, test)


def other_train_folder(config: DataConfig, root: Path) -> str | None:
    """The training folder with a usual name, if --train-split names another folder."""
    named, usual = _named_train_folder(config, root), _of_kind(_subfolders(root), "train")
    found = TRAIN if TRAIN in usual else usual[0] if len(usual) == 1 else None
    return None if named in (None, found) else found


def check_classes(config: DataConfig, folders: list[str]) -> None:
    """Raises UserError if the names of two folders, both taken for classes, are those of splits."""
    kinds = {name: _kinds(name) for name in folders}
    for_testing = [name for name in folders if kinds[name] & {"test", "validation"}]
    for train in (name for name in folders if "train" in kinds[name]):
        for test in for_testing:
            if test != train:
                raise _ambiguous(
                    config, f"folders {one_line(train)} and {one_line(test)}, which may be splits or classes"
                )


def _named_train_folder(config: DataConfig, root: Path) -> str | None:
    """The folder that --train-split names; None if it names none, or `train` and there is no such folder."""
    if config.train_split is None:
        return None
    if os.path.isdir(root / config.train_split):
        return os.path.normpath(config.train_split)
    if config.train_split == TRAIN:  # the default in the configs of version 0.2.0 and earlier
        return None
    raise UserError(
        f"--train-split is {config.train_split!r}: {root} has no such subfolder, so create it or choose another."
    )


def _subfolders(root: Path) -> list[str]:
    with listing("dataset"):
        return sorted(name for name in os.listdir(root) if os.path.isdir(root / name) and not name.startswith("."))


def _kinds(name: str) -> set[str | None]:
    """The kinds of split that a name's words stand for, None for any other word."""
    words = [re.sub(FILLERS, "", word.lower()) for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)]
    return {KINDS.get(word) for word in words if word}


def _of_kind(folders: list[str], kind: str) -> list[str]:
    return [name for name in folders if _kinds(name) == {kind}]


def _only(config: DataConfig, folders: list[str]) -> str | None:
    """The only folder, None if there is none."""
    if len(folders) > 1:
        raise _ambiguous(config, f"folders {one_line(folders[0])} and {one_line(folders[1])} for the same split")
    return folders[0] if folders else None


def _ambiguous(config: DataConfig, what: str) -> UserError:
    return UserError(
        f"--dataset {config.dataset!r} has {what}: choose folders with --train-split and --test-split, or give "
        f"--train-split {WHOLE} if all subfolders are classes."
    )


def _overlap(one: Path, other: Path) -> bool:
    one, other = one.resolve(), other.resolve()
    return one.is_relative_to(other) or other.is_relative_to(one)
