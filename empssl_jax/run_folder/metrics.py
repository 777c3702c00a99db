"""What training reports: a progress bar, metrics.jsonl, timing.jsonl, probe.jsonl and loggers."""

import collections
import contextlib
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from jaxtyping import Array
from tqdm import tqdm

from empssl_jax.config.errors import DivergenceError
from empssl_jax.run_folder.loggers import EventFile, Logger
from empssl_jax.run_folder.step_files import METRICS_FILE, PROBE_FILE, TimingFile, drop_steps_from
from empssl_jax.runtime.distributed import is_first_process


class MetricsWriter:
    """Writes the metrics of each step once and in order, also across interruptions; a context manager.

    Every process checks the metrics and computes the mean loss; only the first process writes.

    Args:
        workdir: folder of the run; gets metrics.jsonl and timing.jsonl, with one JSON object a step, and tensorboard/.
        first_step: the step at which training starts or resumes. Lines that an interrupted run wrote from this step on
            are dropped, since these steps run again.
        last_step: number of steps in the whole run.
        patches_per_step: for the throughput.
        coding_rate_bounds: the coding rates that `coding_rate_fraction` maps to 0 and 1.
        loggers: further loggers of the first process; closed with the writer.
    """

    def __init__(
        self,
        workdir: Path,
        first_step: int,
        last_step: int,
        patches_per_step: int,
        coding_rate_bounds: tuple[float, float],
        loggers: Sequence[Logger] = (),
    ):
        path, self._probe_path = workdir / METRICS_FILE, workdir / PROBE_FILE
        self._writes = is_first_process()
        if self._writes:
            drop_steps_from(path, first_step)
            drop_steps_from(self._probe_path, first_step + 1)
            self._lines = path.open("a")
            self._timing = TimingFile(workdir, first_step)
            self._loggers: list[Logger] = [EventFile(workdir / "tensorboard", first_step), *loggers]
            self._times = collections.deque([self._timing.clock.seconds()], maxlen=10)
            self._bar = tqdm(total=last_step, initial=first_step, desc="training", unit="step", disable=None)
        self._patches_per_step = patches_per_step
        self._coding_rate_bounds = coding_rate_bounds
        self._pending: tuple[int, dict[str, Array]] | None = None
        self._losses: list[float] = []
        self._probed: dict[str, str] = {}  # by the last probe, for the progress bar

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writes:
            self._bar.close()
            self._lines.close()
            self._timing.close()
            for logger in self._loggers:
                logger.close()

    def add(self, step: int, metrics: dict[str, Array]) -> None:
        """Takes the metrics of a step and writes those of the previous step, so that the devices never wait.

        Raises:
            DivergenceError: the metrics of the previous step are not finite.
        """
        self._write_pending()
        self._pending = step, metrics

    def flush(self) -> float:
        """Writes the metrics of the last step too; returns the mean loss since the last flush. Raises like `add`."""
        self._write_pending()
        if self._writes:
            os.fsync(self._lines.fileno())  # a checkpoint of these steps must not outlive their metrics
        losses, self._losses = self._losses, []
        return sum(losses) / len(losses)

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """A context whose time counts neither as training time nor for the throughput."""
        return self._timing.clock.paused() if self._writes else contextlib.nullcontext()

    def add_probe(self, steps_done: int, measured: dict[str, float]) -> None:
        """Writes what an online probe measured after `steps_done` steps, and the training time, to probe.jsonl.

        Args:
            steps_done: number of steps.
            measured: "effective_rank" and, for images with labels, kNN's "top1" and "top5".
        """
        if not self._writes:
            return
        line = {"step": steps_done, "seconds": round(self._timing.clock.seconds(), 3), **measured}
        with self._probe_path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for logger in self._loggers:
            logger.add(steps_done, {f"probe/{name}": value for name, value in measured.items()})
        self._probed = {"kNN": f"{measured['top1']:.1%}"} if "top1" in measured else {}
        self._probed["rank"] = f"{measured['effective_rank']:.1f}"

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        step, on_device = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(on_device).items()}
        if not all(map(math.isfinite, values.values())):
            raise DivergenceError(
                f"Step {step} has loss {values['loss']} and update norm {values['update_norm']}: any checkpoint before "
                "it is kept; try a lower --learning-rate in another --workdir."
            )
        self._losses.append(values["loss"])
        smallest, largest = self._coding_rate_bounds
        values["coding_rate_fraction"] = (values["coding_rate"] - smallest) / (largest - smallest)
        if self._writes:
            self._write(step, values)

    def _write(self, step: int, values: dict[str, float]) -> None:
        self._times.append(self._timing.clock.seconds())
        steps_per_second = (len(self._times) - 1) / (self._times[-1] - self._times[0])
        patches_per_second = steps_per_second * self._patches_per_step
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        self._timing.add(step)
        for logger in self._loggers:
            tagged = values | {"patches_per_second": patches_per_second}
            logger.add(step, {f"train/{name}": value for name, value in tagged.items()})
        shown = {
            "loss": f"{values['loss']:.2f}",
            "coding rate": f"{values['coding_rate']:.2f} ({values['coding_rate_fraction']:.0%})",
            "similarity": f"{values['similarity']:.3f}",
            "lr": f"{values['learning_rate']:.3f}",
            "patches/s": f"{patches_per_second:.0f}",
            **self._probed,
        }
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        if self._bar.disable:
            line = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {step + 1}/{self._bar.total}: {line}", file=sys.stderr, flush=True)
