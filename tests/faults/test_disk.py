"""Full, read-only and vanishing disks, and two processes in one folder: one error message and no data loss."""

import contextlib
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stress.faults import ROOT, Victim, differences
from tests.test_end_to_end import DIGITS

OPTIONS = [*DIGITS, "--max-epochs", "4"]  # 20 steps
pytestmark = [pytest.mark.long, pytest.mark.usefixtures("cache")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A compilation cache that the first run fills and the others read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(scope="module")
def uninterrupted(cache, tmp_path_factory):
    victim = Victim(tmp_path_factory.mktemp("runs") / "uninterrupted", OPTIONS)
    assert victim.end() == 0, victim.output()
    return victim.workdir


def saved_steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def assert_stops(victim: Victim, code: int, *parts: str):
    """Checks that the run ends with this exit code and one error message that contains all parts."""
    assert victim.end() == code, victim.output()
    errors = [line for line in victim.output().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, victim.output()
    assert all(part in errors[0] for part in parts), errors[0]
    assert "Traceback" not in victim.output()


def assert_resumes_bit_identically_to(uninterrupted: Path, workdir: Path):
    step = max(saved_steps(workdir))
    victim = Victim(workdir, OPTIONS)
    assert victim.end() == 0, victim.output()
    assert f"resuming {workdir} at step {step} of 20" in victim.output()
    assert differences(uninterrupted, workdir) == []


def test_a_save_that_does_not_fit_stops_the_run_and_keeps_the_checkpoint_before(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    victim = Victim(workdir, OPTIONS)
    victim.wait_for(lambda: victim.steps() >= 7)
    assert victim.end(signal.SIGTERM) == 143
    before = saved_steps(workdir)
    victim = Victim(workdir, OPTIONS)
    # Files cannot grow beyond 8 kB: metrics.jsonl fits, the files of a checkpoint do not.
    resource.prlimit(victim.process.pid, resource.RLIMIT_FSIZE, (8192, 8192))
    assert_stops(victim, 1, "could not be saved in", "those before it are kept, and the same command resumes there")
    assert saved_steps(workdir) == before
    assert_resumes_bit_identically_to(uninterrupted, workdir)


@contextlib.contextmanager
def small_disk(folder: Path, options: str):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_stops_the_run_and_more_room_lets_it_resume(uninterrupted, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, "size=1600k"):
        assert_stops(Victim(disk, OPTIONS), 1, "No space left on device", "the same command resumes there")
        subprocess.run(["mount", "-o", "remount,size=100M", str(disk)], check=True)
        assert_resumes_bit_identically_to(uninterrupted, disk)


def test_a_read_only_disk_is_refused_at_once(tmp_path):
    with small_disk(tmp_path / "disk", "ro"):
        refusal = "cannot be written to (Read-only file system): give another folder"
        assert_stops(Victim(tmp_path / "disk", OPTIONS), 2, refusal)


def test_a_folder_that_vanishes_stops_the_run_at_the_next_save(tmp_path):
    victim = Victim(tmp_path / "run", OPTIONS)
    victim.wait_for(lambda: victim.steps() >= 4)
    victim.process.send_signal(signal.SIGSTOP)
    shutil.rmtree(victim.workdir)
    victim.process.send_signal(signal.SIGCONT)
    assert_stops(victim, 1, "could not be saved in")


def test_others_are_refused_while_a_run_is_in_the_folder_and_disturb_nothing(uninterrupted, tmp_path):
    first = Victim(tmp_path / "run", OPTIONS)
    first.wait_for(lambda: first.steps() >= 1)
    first.process.send_signal(signal.SIGSTOP)
    refusal = f"is in use by process {first.process.pid} on"
    evaluation = [sys.executable, "eval.py", "--workdir", str(first.workdir)]
    done = subprocess.run(evaluation, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert refusal in done.stderr
    log = first.output()
    second = Victim(first.workdir, OPTIONS)  # writes to the first one's output file
    assert second.end() == 2
    assert refusal in second.output()
    first.process.send_signal(signal.SIGCONT)
    assert first.end() == 0, log
    assert differences(uninterrupted, first.workdir) == []
