"""What a run writes down while it trains: a progress bar, metrics.jsonl and TensorBoard event files."""

import collections
import json
import math
import sys
import time
from pathlib import Path

import jax
from jaxtyping import Array
from tensorboardX import SummaryWriter
from tqdm import tqdm

from empssl_jax.config import UserError


class DivergenceError(UserError):
    """The loss or an update is not finite any more."""

    exit_code = 1


class MetricsWriter:
    """Writes the metrics of each step once and in order, also across interruptions; a context manager.

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
        _drop_steps_from(path, first_step)
        self._lines = path.open("a")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step, write_to_disk=True)
        self._bar = tqdm(total=last_step, initial=first_step, desc="training", unit="step", disable=None)
        self._patches_per_step = patches_per_step
        self._coding_rate_bounds = coding_rate_bounds
        self._times = collections.deque([time.perf_counter()], maxlen=10)
        self._pending: tuple[int, dict[str, Array]] | None = None
        self._losses: list[float] = []

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
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
        self._write(step, values)

    def _write(self, step: int, values: dict[str, float]) -> None:
        self._times.append(time.perf_counter())
        steps_per_second = (len(self._times) - 1) / (self._times[-1] - self._times[0])
        patches_per_second = steps_per_second * self._patches_per_step
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in (values | {"patches_per_second": patches_per_second}).items():
            self._events.add_scalar(f"train/{name}", value, step)
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


def image_progress(description: str, num_images: int) -> tqdm:
    """A progress bar over images; a plain line where it cannot be drawn."""
    bar = tqdm(total=num_images, desc=description, unit=" images", disable=None)
    if bar.disable:
        print(f"{description}: {num_images} images", file=sys.stderr, flush=True)
    return bar


def _drop_steps_from(path: Path, first_step: int) -> None:
    """Keeps the lines of the steps before `first_step`; a line cut short by a crash goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
        if step < first_step:
            kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)
