"""The folder of a run: one job at a time may use it, and disk errors become StorageError."""

import contextlib
import datetime
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from empssl_jax.config.errors import InUseError, StorageError, UserError, one_line
from empssl_jax.runtime.distributed import is_first_process
from empssl_jax.runtime.file_locks import lock_file

LOCK_FILE = "lock"


@contextlib.contextmanager
def locked(workdir: Path, option: str = "workdir") -> Iterator[None]:
    """Creates the folder, which `option` names, and locks it against other jobs.

    Only the first process of a job takes the lock, which ends with the process. See `lock_file` for file systems
    without locks.

    Raises:
        UserError: the folder cannot be written to.
        InUseError: another process is using it.
    """
    if not is_first_process():
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK_FILE).open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(
            f"--{option} {workdir} cannot be written to ({error.strerror}): give another folder."
        ) from error
    with file:
        _lock(file, workdir, option)
        yield


def _lock(file: IO[str], workdir: Path, option: str) -> None:
    try:
        lock_file(file, wait=False)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise InUseError(
            f"--{option} {workdir} is in use by {owner}: wait for it, stop it, or give another folder."
        ) from None
    file.truncate(0)
    now = datetime.datetime.now().astimezone()
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {now:%Y-%m-%d %H:%M:%S %Z}\n")
    file.flush()


@contextlib.contextmanager
def storage_errors(workdir: Path) -> Iterator[None]:
    """Converts an OSError of the folder, for example of a full disk, to StorageError; passes those of other files."""
    try:
        yield
    except OSError as error:
        if isinstance(error, BrokenPipeError) or _is_outside(error.filename, workdir):
            raise
        raise StorageError(
            f"--workdir {workdir} cannot be written to any more ({one_line(error)}): the checkpoints in it are kept, "
            "and the same command resumes there once the cause is fixed."
        ) from error


def _is_outside(filename: object, folder: Path) -> bool:
    """Whether an OSError's file is outside the folder; False if it names no file, as when a write fails."""
    if not isinstance(filename, str | bytes | os.PathLike):
        return False
    return not Path(os.path.realpath(os.fsdecode(filename))).is_relative_to(os.path.realpath(folder))
