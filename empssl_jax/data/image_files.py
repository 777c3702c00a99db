"""Which files of a folder are images: the one rule for data sets and for `empssl embed`.

An image file has one of `SUFFIXES`, in any case. Links are followed, except back to a folder above. Files and folders
whose names begin with a dot are hidden: they are skipped. The other files are counted, and examples named, in one line.
"""

import collections
import contextlib
import functools
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from empssl_jax.config.errors import UserError, counted, one_line

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SUFFIX_LIST = ", ".join(SUFFIXES)  # for messages
SHOWN = 5  # suffixes of other files


class ImageFile(NamedTuple):
    """A file in a folder."""

    name: str  # its path relative to the folder, with slashes
    path: Path
    size: int  # in bytes; -1 if the file is not accessible
    time: int  # of its last change, in nanoseconds; -1 if the file is not accessible


Files = list[ImageFile]


def list_images(root: Path, option: str = "dataset") -> Files:
    """All image files under a folder, sorted by name. Prints once how many other files it holds.

    Args:
        root: the folder.
        option: the option that named the folder, for the error message.

    Raises:
        UserError: a folder cannot be listed.
    """
    files: Files = []
    others: Files = []
    with listing(option):
        for path, status in _walk(root):
            (files if _is_image(path, status) else others).append(_image_file(root, path, status))
    if others:
        found = counted(len(others), "other file")
        _print_once(f"left out {found} of {root} (images end in {SUFFIX_LIST}): {_kinds(others)}")
    return sorted(files)


def has_images(root: Path) -> bool:
    """Returns whether there is an image file under a folder; raises OSError if a folder cannot be listed."""
    return any(_is_image(path, status) for path, status in _walk(root))


@contextlib.contextmanager
def listing(option: str) -> Iterator[None]:
    """Raises UserError, naming the option, for a folder that cannot be listed."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--{option}: {error.filename} cannot be listed ({error.strerror}): fix or remove it."
        ) from error


def look_at(root: Path, path: Path) -> ImageFile:
    """The name, size and time of a file under a folder."""
    return _image_file(root, path, _status(path))


def _is_image(path: Path, status: os.stat_result | None) -> bool:
    return path.name.lower().endswith(SUFFIXES) and (status is None or stat.S_ISREG(status.st_mode))


def _image_file(root: Path, path: Path, status: os.stat_result | None) -> ImageFile:
    size, time = (-1, -1) if status is None else (status.st_size, status.st_mtime_ns)
    return ImageFile(path.relative_to(root).as_posix(), path, size, time)


def _status(path: Path | os.DirEntry[str]) -> os.stat_result | None:
    """The status of a file; None for a link that leads nowhere or to itself, which decoding reports."""
    try:
        return path.stat()
    except OSError:
        return None


def _walk(root: Path) -> Iterator[tuple[Path, os.stat_result | None]]:
    """All files of any kind under a folder that are not hidden. Links to a folder above are not followed."""
    pending: list[tuple[Path, frozenset[str]]] = [(root, frozenset())]
    while pending:
        folder, above = pending.pop()
        here = os.path.realpath(folder)
        if here in above:
            continue
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                status = _status(entry)
                if status is not None and stat.S_ISDIR(status.st_mode):
                    pending.append((Path(entry.path), above | {here}))
                else:
                    yield Path(entry.path), status


def _kinds(files: Files) -> str:
    """The number of files of each suffix, and one of them: "3 like 'a.heic', 1 like 'notes.txt'"."""
    names = sorted(file.name for file in files)
    counts = collections.Counter(Path(name).suffix.lower() for name in names)
    first = {Path(name).suffix.lower(): name for name in reversed(names)}
    common = counts.most_common(SHOWN)
    listed = [f"{count} like {one_line(first[suffix])}" for suffix, count in common]
    return ", ".join(listed + [f"{len(names) - sum(count for _, count in common)} more"] * (len(counts) > SHOWN))


@functools.cache  # a folder is listed several times in a run
def _print_once(line: str) -> None:
    print(line, file=sys.stderr)
