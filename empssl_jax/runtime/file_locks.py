"""Locks on files, so that one process at a time uses a folder."""

import errno
import fcntl
import sys
from pathlib import Path
from typing import IO

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # from file systems that have none


def lock_file(file: IO, wait: bool) -> None:
    """Locks an open file until it is closed. On a file system without locks, prints a warning instead.

    The operating system releases the lock when the process ends, even if it is killed.

    Args:
        file: a file that is open for writing.
        wait: wait for a process that holds the lock.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is false.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        folder = Path(file.name).parent
        print(f"warning: {folder} cannot be locked: let only one process at a time use it", file=sys.stderr)
