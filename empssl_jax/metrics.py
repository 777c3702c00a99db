"""What a run writes down while it trains: a progress bar, metrics.jsonl and TensorBoard event files."""

import collections
import json
import math
import os
import sys
import time
from pathlib import Path

import jax
from jaxtyping import Array
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from empssl_jax.config import UserError
from empssl_jax.distributed import is_first_process
from empssl_jax.workdir import replacing


class DivergenceError(UserError):
    """The loss or an update is not finite any more."""

    exit_code = 1


class MetricsWriter:
    """Writes the metrics of each step once and in order, also across interruptions; a context manager.

    Every process checks them and knows their mean; the first one writes.

    Args:
        workdir: folder of the run; gets metrics.jsonl, one JSON object a step, and tensorboard/.
        first_step: the step that training starts or resumes at; what an interrupted run wrote from there on is
            dropped, since those steps are made again.
        last_step: number of steps in the whole run.
        patches_per_step: for the throughput.
        coding_rate_bounds: the coding rates that are shown as 0 and as 1.
    """

    def __init__(
        self,
        workdir: Path,
        first_step: int,
        last_step: int,
        patches_per_step: int,
        coding_rate_bounds: tuple[float, float],
    ):
        path = workdir / "metrics.jsonl"
        self._writes = is_first_process()
        if self._writes:
            _drop_steps_from(path, first_step)
            self._lines = path.open("a")
            self._events = _EventFile(workdir / "tensorboard", first_step)
            self._bar = tqdm(total=last_step, initial=first_step, desc="training", unit="step", disable=None)
        self._patches_per_step = patches_per_step
        self._coding_rate_bounds = coding_rate_bounds
        self._times = collections.deque([time.perf_counter()], maxlen=10)
        self._pending: tuple[int, dict[str, Array]] | None = None
        self._losses: list[float] = []

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writes:
            self._bar.close()
            self._lines.close()
            self._events.close()

    def add(self, step: int, metrics: dict[str, Array]) -> None:
        """Takes the metrics of a step and writes those of the step before, so that the devices never wait.

        Raises:
            DivergenceError: those of the step before are not finite.
        """
        self._write_pending()
        self._pending = step, metrics

    def flush(self) -> float:
        """Writes those of the last step too; returns the mean loss of the steps since the last flush, see `add`."""
        self._write_pending()
        if self._writes:
            os.fsync(self._lines.fileno())  # a checkpoint of these steps must not outlive their metrics
        losses, self._losses = self._losses, []
        return sum(losses) / len(losses)

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        step, on_device = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(on_device).items()}
        if not all(map(math.isfinite, values.values())):
            raise DivergenceError(
                f"Step {step} has loss {values['loss']} and update norm {values['update_norm']}: the last checkpoint "
                "before it is kept; try a lower --learning-rate."
            )
        self._losses.append(values["loss"])
        smallest, largest = self._coding_rate_bounds
        values["coding_rate_fraction"] = (values["coding_rate"] - smallest) / (largest - smallest)
        if self._writes:
            self._write(step, values)

    def _write(self, step: int, values: dict[str, float]) -> None:
        self._times.append(time.perf_counter())
        steps_per_second = (len(self._times) - 1) / (self._times[-1] - self._times[0])
        patches_per_second = steps_per_second * self._patches_per_step
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        self._events.add(step, values | {"patches_per_second": patches_per_second})
        shown = {
            "loss": f"{values['loss']:.2f}",
            "coding rate": f"{values['coding_rate']:.2f} ({values['coding_rate_fraction']:.0%})",
            "similarity": f"{values['similarity']:.3f}",
            "lr": f"{values['learning_rate']:.3f}",
            "patches/s": f"{patches_per_second:.0f}",
        }
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        if self._bar.disable:
            line = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {step + 1}/{self._bar.total}: {line}", file=sys.stderr, flush=True)


class _EventFile:
    """TensorBoard's event file, written by the caller's thread: that of tensorboardX would hang on a full disk.

    Steps from `first_step` on that earlier files hold are hidden.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._writer.write_event(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: dict[str, float]) -> None:
        scalars = [Summary.Value(tag=f"train/{name}", simple_value=value) for name, value in values.items()]
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def image_progress(description: str, num_images: int) -> tqdm:
    """A progress bar over images; a plain line where it cannot be drawn."""
    bar = tqdm(total=num_images, desc=description, unit=" images", disable=None if is_first_process() else True)
    if bar.disable and is_first_process():
        print(f"{description}: {num_images} images", file=sys.stderr, flush=True)
    return bar


def _drop_steps_from(path: Path, first_step: int) -> None:
    """Keeps the lines of the steps before `first_step`; what is no line of a step, as one cut by a crash, goes too."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(errors="replace").split("\n") if _step_of(line) < first_step]
    with replacing(path) as file:
        file.write("".join(line + "\n" for line in kept).encode())


def _step_of(line: str) -> int | float:
    """The step of a line of metrics.jsonl, infinite if it is none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if type(step) is int and step >= 0 else math.inf
