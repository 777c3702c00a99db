"""What a run writes down while it trains: a progress bar, metrics.jsonl and TensorBoard event files."""

import collections
import json
import sys
import time
from pathlib import Path

from tensorboardX import SummaryWriter
from tqdm import tqdm

Metrics = dict[str, float]


class MetricsWriter:
    """Writes the metrics of each step once and in order, also across interruptions; a context manager.

    Args:
        workdir: folder of the run; gets metrics.jsonl, one JSON object a step, and tensorboard/.
        first_step: the step that training starts or resumes at; what an interrupted run wrote from there on is
            dropped, since those steps are made again.
        last_step: number of steps in the whole run.
        patches_per_step: for the throughput.
    """

    def __init__(self, workdir: Path, first_step: int, last_step: int, patches_per_step: int):
        path = workdir / "metrics.jsonl"
        _drop_steps_from(path, first_step)
        self._lines = path.open("a")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step, write_to_disk=True)
        self._bar = tqdm(total=last_step, initial=first_step, desc="training", unit="step", disable=None)
        self._patches_per_step = patches_per_step
        self._times = collections.deque([time.perf_counter()], maxlen=10)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        self._lines.close()
        self._events.close()

    def write(self, step: int, metrics: Metrics) -> None:
        """Writes the metrics of step `step`, and the patches a second over the last steps."""
        self._times.append(time.perf_counter())
        steps_per_second = (len(self._times) - 1) / (self._times[-1] - self._times[0])
        patches_per_second = steps_per_second * self._patches_per_step
        self._lines.write(json.dumps({"step": step, **metrics}) + "\n")
        self._lines.flush()
        for name, value in metrics.items():
            self._events.add_scalar(f"train/{name}", value, step)
        self._events.add_scalar("train/patches_per_second", patches_per_second, step)
        shown = {
            "loss": f"{metrics['loss']:.2f}",
            "coding rate": f"{metrics['coding_rate']:.2f} ({metrics['coding_rate_fraction']:.0%})",
            "similarity": f"{metrics['similarity']:.3f}",
            "lr": f"{metrics['learning_rate']:.3f}",
            "patches/s": f"{patches_per_second:.0f}",
        }
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        if self._bar.disable:
            values = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {step + 1}/{self._bar.total}: {values}", file=sys.stderr, flush=True)


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
