"""Trains many short epochs with a save after each, then evaluates many times, and reports which resources grow.

    python -m tests.stress.soak [--minutes 30] [--evaluations 50] [--output FILE]

Everything runs in one process, on the built-in digits with a tiny model, so half an hour holds more than a thousand
epochs. Host memory, open files, threads, and the number and bytes of live device arrays are sampled. A line is fitted
to each over the last three quarters of the samples, when caches are full.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

from benchmarks.measure import environment
from empssl_jax import training
from empssl_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, PatchConfig, RunConfig, TrainingConfig
from empssl_jax.config.command_options import EvaluateOptions
from empssl_jax.data.datasets import load_split
from empssl_jax.evaluation.evaluate import evaluate as evaluate_run

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Options:
    """The length of the test, and the file for the report."""

    # Minutes of training.
    minutes: float = 30.0
    # Number of evaluations after training.
    evaluations: int = 50
    # JSON file for the report.
    output: str = "tests/stress/results/soak.json"


def config(workdir: str) -> Config:
    """Five steps per epoch, and more epochs than the time allows."""
    return Config(
        data=DataConfig(dataset="digits", images_per_class=20, test_images_per_class=10),
        patches=PatchConfig(train_patches=4, patch_size=16),
        model=ModelConfig(width=4, hidden_dim=32, projection_dim=16, precision="float32"),
        training=TrainingConfig(batch_size=40, max_epochs=100_000),
        evaluation=EvaluationConfig(valid_patches=2, embedding_batch_size=64, linear_epochs=5),
        run=RunConfig(workdir=workdir),
    )


def sample() -> dict[str, float]:
    """The resources that this process holds now."""
    status = Path("/proc/self/status").read_text()
    arrays = jax.live_arrays()
    return {
        "host memory, MB": int(status.split("VmRSS:")[1].split()[0]) / 1000,
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": int(status.split("Threads:")[1].split()[0]),
        "live arrays": len(arrays),
        "device memory, MB": sum(array.nbytes for array in arrays) / 1e6,
    }


class Sampler(threading.Thread):
    """Samples in the background, and ends training after some seconds with SIGTERM, as a preemption does."""

    def __init__(self, seconds: float) -> None:
        super().__init__(daemon=True)
        self.samples: list[dict[str, float]] = []
        self._seconds = seconds

    def run(self) -> None:
        start, interval = time.monotonic(), max(self._seconds / 500, 0.2)
        while (elapsed := time.monotonic() - start) < self._seconds:
            self.samples.append({"hours": elapsed / 3600} | sample())
            time.sleep(interval)
        os.kill(os.getpid(), signal.SIGTERM)


def slopes(samples: list[dict[str, float]], unit: str) -> dict[str, dict[str, float]]:
    """For each quantity, the first and last value and the slope of a fitted line over the last three quarters."""
    late = samples[len(samples) // 4 :]
    x = np.array([one[unit] for one in late])
    report = {}
    for name in late[0].keys() - {unit}:
        y = np.array([one[name] for one in late])
        report[name] = {
            "first": float(y[0]),
            "last": float(y[-1]),
            f"slope per {unit[:-1]}": float(np.polyfit(x, y, 1)[0]),
        }
    return dict(sorted(report.items()))


def train(workdir: Path, minutes: float) -> tuple[int, list[dict[str, float]]]:
    """Trains for some minutes; returns the number of epochs and the samples."""
    sampler = Sampler(60 * minutes)
    sampler.start()
    with (workdir / "log").open("w") as log, contextlib.redirect_stderr(log), contextlib.suppress(SystemExit):
        training.train(config(str(workdir)))
    return len((workdir / "metrics.jsonl").read_text().splitlines()) // 5, sampler.samples


def evaluate(workdir: Path, times: int) -> list[dict[str, float]]:
    """Evaluates the run several times; returns a sample after each."""
    samples = []
    options = EvaluateOptions(workdir=str(workdir), evaluation=config(str(workdir)).evaluation)
    for number in range(times):
        with (workdir / "log").open("a") as log, contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
            evaluate_run(options, write_report=lambda *_: None)
        samples.append({"evaluations": float(number)} | sample())
    return samples


def main(options: Options) -> None:
    """Runs the test; writes and prints the report."""
    with tempfile.TemporaryDirectory() as folder:
        epochs, samples = train(Path(folder), options.minutes)
        report = {"epochs": epochs, "training": slopes(samples, "hours")}
        report["evaluations"] = slopes(evaluate(Path(folder), options.evaluations), "evaluations")
    written = {**environment(), **dataclasses.asdict(options), **report}
    (ROOT / options.output).write_text(json.dumps(written, indent=2) + "\n")
    json.dump(report, sys.stdout, indent=2)


if __name__ == "__main__":
    # Load the data once before sampling, so the first sample is not of a process without them.
    load_split(config("unused").data, "train", None)
    main(tyro.cli(Options, description=__doc__))
