"""Files of one JSON object a step, each step once and in order, also across interruptions.

metrics.jsonl repeats bit for bit; how long training takes does not, and so has a file of its own, timing.jsonl.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from empssl_jax.runtime.atomic_write import atomic_write

METRICS_FILE = "metrics.jsonl"
PROBE_FILE = "probe.jsonl"
TIMING_FILE = "timing.jsonl"


def drop_steps_from(path: Path, first_step: int) -> None:
    """Keeps the lines of the steps before `first_step`; what is no line of a step, as one cut by a crash, goes too."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(errors="replace").split("\n") if _step_of(line) < first_step]
    with atomic_write(path) as file:
        file.write("".join(line + "\n" for line in kept).encode())


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, in order, without what is no line of a step; none if there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(errors="replace").split("\n")
    return [json.loads(line) for line in lines if _step_of(line) < math.inf]


def _step_of(line: str) -> int | float:
    """The step of a line, infinite if it is none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if type(step) is int and step >= 0 else math.inf


class TrainingClock:
    """Seconds of training, from `start` on; they stand still while something else is measured."""

    def __init__(self, start: float = 0.0):
        self._zero = time.perf_counter() - start

    def seconds(self) -> float:
        """Seconds of training so far, compilation included."""
        return time.perf_counter() - self._zero

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside takes no time."""
        begin = time.perf_counter()
        yield
        self._zero += time.perf_counter() - begin


class TimingFile:
    """Writes timing.jsonl: after each step the seconds of training, and on what devices.

    The seconds go on across interruptions: the time in between and steps that are made again do not count.

    Args:
        workdir: folder of the run.
        first_step: the step that training starts or resumes at.
    """

    def __init__(self, workdir: Path, first_step: int):
        path = workdir / TIMING_FILE
        drop_steps_from(path, first_step)
        self.clock = TrainingClock(seconds_so_far(workdir))
        self._lines = path.open("a")
        self._devices = _devices()

    def add(self, step: int) -> None:
        """Writes the seconds at which a step was done."""
        line = {"step": step, "seconds": round(self.clock.seconds(), 3), "devices": self._devices}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


def seconds_so_far(workdir: Path) -> float:
    """Seconds of training of the last step in timing.jsonl, 0 without one."""
    seconds = [line.get("seconds") for line in read_steps(workdir / TIMING_FILE)]
    known = [value for value in seconds if isinstance(value, int | float) and 0 <= value < math.inf]
    return float(known[-1]) if known else 0.0


def _devices() -> str:
    """What trains, as "8 x NVIDIA H100"; of CPUs the cores count, since JAX calls them all one device."""
    if jax.default_backend() == "cpu":
        return f"{len(os.sched_getaffinity(0)) * jax.process_count()} CPU cores"
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
