"""Only one process at a time uses a run's folder, and files are replaced atomically."""

import errno
import os
import resource
import subprocess
import sys

import pytest

from empssl_jax.config.errors import StorageError, UserError
from empssl_jax.run_folder.workdir import locked, storage_errors
from empssl_jax.runtime.atomic_write import atomic_write

HOLD = """
import sys
from pathlib import Path
from empssl_jax.run_folder.workdir import locked
with locked(Path(sys.argv[1])):
    print("claimed", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "claimed\n"
    with (
        pytest.raises(UserError, match=rf"is in use by process {process.pid} on .*: wait for it, stop it"),
        locked(tmp_path),
    ):
        pass
    process.kill()
    process.communicate()
    with locked(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()


def test_the_same_process_can_claim_again(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "new"):
            pass


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"--workdir .*file.* cannot be written to \(.*\): give another folder"):
            locked(workdir).__enter__()


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("before")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        refused = pytest.raises(StorageError, match=r"cannot be written to any more \(\[Errno 27\] File too large\)")
        with refused, storage_errors(tmp_path), atomic_write(path) as file:
            file.write(b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["results.json"]
    with atomic_write(path) as file:
        file.write(b"after")
    assert path.read_text() == "after"


def test_only_errors_of_the_folder_blame_it(tmp_path):
    def fail(kind, number, *files):
        with storage_errors(tmp_path / "run"):
            raise kind(number, os.strerror(number), *files)

    refused = (
        r"^--workdir .*/run cannot be written to any more \(\[Errno 28\] No space left on device{}\): the checkpoints"
    )
    with pytest.raises(StorageError, match=refused.format("")):
        fail(OSError, errno.ENOSPC)
    with pytest.raises(StorageError, match=refused.format(": '.*/run/results.json.tmp'")):
        fail(OSError, errno.ENOSPC, str(tmp_path / "run" / "results.json.tmp"))
    with pytest.raises(FileNotFoundError, match="image"):
        fail(FileNotFoundError, errno.ENOENT, tmp_path / "image")
    with pytest.raises(BrokenPipeError):
        fail(BrokenPipeError, errno.EPIPE)


def test_what_was_not_written_completely_is_removed_and_the_error_kept(tmp_path):
    def write_half(error):
        with atomic_write(tmp_path / "x") as file:
            file.write(b"half")
            raise error

    for error in (KeyboardInterrupt, SystemExit, ValueError):
        with pytest.raises(error):
            write_half(error)
        assert os.listdir(tmp_path) == []
    (tmp_path / "folder" / "x").mkdir(parents=True)
    with pytest.raises(IsADirectoryError), atomic_write(tmp_path / "folder") as file:
        file.write(b"whole")
    assert os.listdir(tmp_path) == ["folder"]
    (tmp_path / "x.tmp").mkdir()
    with pytest.raises(IsADirectoryError), atomic_write(tmp_path / "x"):
        pass
