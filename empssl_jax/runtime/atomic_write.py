"""Replaces files atomically."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from empssl_jax.config.errors import require


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Yields a file to write, which replaces `path` once it is complete and on disk. After an error it is removed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # an incomplete file would keep a full disk full
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Writes or replaces a file atomically, in UTF-8."""
    with atomic_write(path) as file:
        file.write(text.encode())


def check_output(path: Path, option: str = "output") -> None:
    """Raises UserError if `path`, the value of `option`, is a folder or a device, which no file should replace."""
    remedy = "that is a folder or a device, so give the name of a file"
    require(path.is_file() or not path.exists(), option, str(path), remedy)
