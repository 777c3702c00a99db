"""Files with one JSON object a step: each step once and in order, also across interruptions.

metrics.jsonl is bit-identical when a run is repeated. Times are not, so they have their own file, timing.jsonl.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from empssl_jax.runtime.atomic_write import write_text
from empssl_jax.runtime.cores import usable_cores

METRICS_FILE = "metrics.jsonl"
PROBE_FILE = "probe.jsonl"
TIMING_FILE = "timing.jsonl"


def drop_steps_from(path: Path, first_step: int) -> None:
    """Keeps only the lines of steps before `first_step`; drops invalid lines too, such as one cut off by a crash."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(errors="replace").split("\n") if _step_of(line) < first_step]
    write_text(path, "".join(line + "\n" for line in kept))


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, in order, without invalid lines; empty if there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(errors="replace").split("\n")
    return [json.loads(line) for line in lines if _step_of(line) < math.inf]


def _step_of(line: str) -> int | float:
    """The step of a line, infinite if the line is invalid."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if type(step) is int and step >= 0 else math.inf


class TrainingClock:
    """Measures the seconds of training, counting from `start`; can be paused."""

    def __init__(self, start: float = 0.0):
        self._zero = time.perf_counter() - start

    def seconds(self) -> float:
        """Seconds of training so far, including compilation."""
        return time.perf_counter() - self._zero

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count."""
        begin = time.perf_counter()
        yield
        self._zero += time.perf_counter() - begin


class TimingFile:
    """Writes timing.jsonl: the seconds of training after each step, and the devices.

    A resumed run continues from the seconds of the last kept step: neither the interruption nor lost steps count.

    Args:
        workdir: folder of the run.
        first_step: the step at which training starts or resumes.
    """

    def __init__(self, workdir: Path, first_step: int):
        path = workdir / TIMING_FILE
        drop_steps_from(path, first_step)
        self.clock = TrainingClock(seconds_so_far(workdir))
        self._lines = path.open("a")
        self._devices = _devices()

    def add(self, step: int) -> None:
        """Writes the seconds of training at the end of a step."""
        line = {"step": step, "seconds": round(self.clock.seconds(), 3), "devices": self._devices}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


def seconds_so_far(workdir: Path) -> float:
    """Seconds of training at the last step in timing.jsonl, 0 if there is none."""
    seconds = [line.get("seconds") for line in read_steps(workdir / TIMING_FILE)]
    valid = [value for value in seconds if isinstance(value, int | float) and 0 <= value < math.inf]
    return float(valid[-1]) if valid else 0.0


def _devices() -> str:
    """The devices, for example "8 x NVIDIA H100"; on CPU the number of cores, which JAX counts as one device."""
    if jax.default_backend() == "cpu":
        return f"{usable_cores() * jax.process_count()} CPU cores"
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
