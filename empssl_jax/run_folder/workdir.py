"""The folder of a run: claimed by one process at a time, its files whole or absent, its disk errors told plainly."""

import contextlib
import datetime
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from empssl_jax.config.errors import InUseError, StorageError, UserError
from empssl_jax.runtime.distributed import is_first_process

LOCK_FILE = "lock"


@contextlib.contextmanager
def locked(workdir: Path, option: str = "workdir") -> Iterator[None]:
    """Makes the folder, which an option has named, and keeps every other job out of it.

    The lock is the operating system's, so that it ends with its process, however that ends. Of the processes of a job
    only the first one takes it.

    Raises:
        UserError: the folder cannot be written to.
        InUseError: another process is using it.
    """
    if not is_first_process():
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK_FILE).open("a+")
    except OSError as error:
        raise UserError(
            f"--{option} {workdir} cannot be written to ({error.strerror}): give another folder."
        ) from error
    with file:
        _lock(file, workdir, option)
        yield


def _lock(file: IO[str], workdir: Path, option: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise InUseError(
            f"--{option} {workdir} is in use by {owner}: wait for it, stop it, or give another folder."
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        print(f"warning: {workdir} cannot be locked: let only one process at a time use it", file=sys.stderr)
    file.truncate(0)
    now = datetime.datetime.now().astimezone()
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {now:%Y-%m-%d %H:%M:%S %Z}\n")
    file.flush()


@contextlib.contextmanager
def storage_errors(workdir: Path) -> Iterator[None]:
    """Raises StorageError in place of an OSError, as of a full disk."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"--workdir {workdir} cannot be written to any more ({error.strerror or error}): the checkpoints in it are "
            "kept, and the same command resumes there once that is mended."
        ) from error
