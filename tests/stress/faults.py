"""Kills training at random moments, restarts it until it finishes, and compares it with an uninterrupted run.

    python -m tests.stress.faults [--kills 50] [--seed 0] [--output FILE] [options of train.py]

There are three kinds of moments: between two steps, while a checkpoint is being written, and while the trained encoder
embeds the images. Of the first kind, one in four is a SIGTERM; all others are SIGKILL. The interrupted run restarts
until it finishes. Then parameters, BatchNorm statistics, optimizer state, metrics.jsonl, embeddings and results must be
bit-identical to those of the uninterrupted run. Runs are repeated in new folders until all kills are used.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tyro

from benchmarks.measure import environment

ROOT = Path(__file__).parents[2]
TRAIN_OPTIONS = ["--config", "configs/digits.py", "--checkpoint-every", "3", "--no-untrained", "--no-report"]
NOT_INHERITED = ("XLA_FLAGS", "TF_CPP_MIN_LOG_LEVEL")
STEPS, SAVE, EMBEDDING = "between steps", "during a save", "during the embedding"


@dataclass(frozen=True)
class Options:
    """The kills, and the file for the report."""

    # Number of kills, over all runs.
    kills: int = 50
    # Seed of the random moments.
    seed: int = 0
    # JSON file for the report.
    output: str = "tests/stress/results/faults.json"


@dataclass
class Report:
    """The interruptions and their consequences."""

    kills: dict[str, int] = field(default_factory=lambda: {STEPS: 0, SAVE: 0, EMBEDDING: 0})
    terminations: int = 0  # SIGTERMs, each followed by at most one more step, a save and exit code 143
    runs: int = 0
    resumed: int = 0
    steps_repeated: int = 0
    mismatches: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The report as a Markdown table."""
        rows = {f"SIGKILL {moment}": count for moment, count in self.kills.items()}
        rows |= {"SIGTERM between steps": self.terminations, "runs completed": self.runs}
        rows |= {"resumptions": self.resumed, "steps repeated": self.steps_repeated}
        rows |= {"differences from the uninterrupted run": len(self.mismatches)}
        return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


class Victim:
    """A running train.py. Its progress is read from its folder; its output goes to a file beside the folder.

    Args:
        workdir: folder of the run.
        options: other options of train.py.
    """

    def __init__(self, workdir: Path, options: list[str]) -> None:
        self.workdir, self._log = workdir, workdir.with_name(workdir.name + ".log")
        # These variables were set by the package and the tests for their own process.
        inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        command = [sys.executable, "train.py", *options, "--workdir", str(workdir)]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=inherited, stdout=log, stderr=subprocess.STDOUT)

    def steps(self) -> int:
        """Number of steps in metrics.jsonl."""
        path = self.workdir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written."""
        folder = self.workdir / "checkpoints"
        return folder.exists() and any("tmp" in path.name for path in folder.iterdir())

    def output(self) -> str:
        """Everything it has printed."""
        return self._log.read_text()

    def wait_for(self, reached: Callable[[], bool]) -> bool:
        """Waits until `reached` returns True or the process ends; returns whether it was reached."""
        while self.process.poll() is None:
            if reached():
                return True
            time.sleep(0.001)
        return False

    def end(self, number: int | None = None) -> int:
        """Sends a signal, if one is given, and returns the exit code."""
        if number is not None:
            self.process.send_signal(number)
        return self.process.wait(timeout=600)


def run_with_kills(
    reference: Path, workdir: Path, options: list[str], moments: random.Random, report: Report, kills: int
) -> int:
    """Runs train.py to its end with at most `kills` kills, and compares it with the run in `reference`.

    Returns the number of kills.
    """
    last_step = len((reference / "metrics.jsonl").read_text().splitlines())
    for kill in range(kills + 1):
        victim = Victim(workdir, options)
        before = victim.steps()
        if kill < kills and (before < last_step or moments.random() < 0.5):
            kill_at_random(victim, before >= last_step, moments, report)
        code, output = victim.end(), victim.output()
        if f"resuming {workdir}" in output:
            report.resumed += 1
            resumed = int(output.split(f"resuming {workdir} at step ")[1].split()[0])
            report.steps_repeated += max(0, before - resumed)
        if code == 0:
            break
        if code not in (-signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM):
            report.mismatches.append(f"exit code {code}: {output[-2000:]}")
            return kill + 1
    report.runs += 1
    report.mismatches += differences(reference, workdir)
    return kill


def kill_at_random(victim: Victim, trained: bool, moments: random.Random, report: Report) -> None:
    """Kills or terminates a process at a random moment, unless it ends before."""
    chosen = EMBEDDING if trained else moments.choices((STEPS, SAVE, EMBEDDING), (5, 3, 2))[0]
    if chosen == EMBEDDING:
        victim.wait_for(lambda: "embedding train" in victim.output())
        time.sleep(moments.uniform(0, 0.3))
    elif chosen == SAVE:
        victim.wait_for(victim.is_saving)
        time.sleep(moments.uniform(0, 0.03))
    else:
        victim.wait_for(lambda: "step " in victim.output())
        goal = victim.steps() + moments.randint(0, 6)
        victim.wait_for(lambda: victim.steps() >= goal)
        time.sleep(moments.uniform(0, 0.05))
        if moments.random() < 0.25:
            _terminate(victim, report)
            return
    report.kills[chosen] += victim.end(signal.SIGKILL) == -signal.SIGKILL


def _terminate(victim: Victim, report: Report) -> None:
    """Sends SIGTERM, and checks that at most one more step is made and saved before exit code 143."""
    before = victim.steps()
    code = victim.end(signal.SIGTERM)
    if "stopped and saved" not in victim.output():
        return  # the signal came before the first step or after the last
    report.terminations += 1
    stopped = int(victim.output().split("stopped and saved at step ")[1].split()[0])
    newest = max(int(path.name) for path in (victim.workdir / "checkpoints").iterdir() if path.name.isdigit())
    # While training, metrics.jsonl is one step behind, and the current step is still completed.
    if code != 143 or stopped != newest or stopped != victim.steps() or stopped - before > 2:
        report.mismatches.append(f"SIGTERM at {before} steps: exit code {code}, stopped at {stopped}, saved {newest}")


def differences(reference: Path, other: Path) -> list[str]:
    """The files and arrays that differ between two finished runs."""
    found = []
    for name in ("metrics.jsonl", "results.json"):
        if (reference / name).read_text() != (other / name).read_text():
            found.append(f"{other}: {name}")
    for ours, theirs in zip(_checkpoint(reference), _checkpoint(other), strict=True):
        if not np.array_equal(ours, theirs):
            found.append(f"{other}: an array of shape {ours.shape} of the last checkpoint")
    for split in ("train", "test"):
        with (
            np.load(reference / "embeddings" / f"{split}.npz", allow_pickle=False) as ours,
            np.load(other / "embeddings" / f"{split}.npz", allow_pickle=False) as theirs,
        ):
            found += [f"{other}: {split} {name}" for name in ours if not np.array_equal(ours[name], theirs[name])]
    return found


def _checkpoint(workdir: Path) -> list[np.ndarray]:
    """All arrays of the newest checkpoint, read without the package."""
    steps = [path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    newest = max(steps, key=lambda path: int(path.name)).absolute()
    trees = [ocp.StandardCheckpointer().restore(newest / item) for item in ("encoder", "optimizer")]
    return [np.asarray(array) for array in jax.tree.leaves(trees)]


def run(kills: int, seed: int, options: list[str], folder: Path) -> Report:
    """Makes one uninterrupted run, and interrupted ones until all kills are used, in a folder."""
    report, moments, used = Report(), random.Random(seed), 0
    reference = Victim(folder / "uninterrupted", options)
    if (code := reference.end()) != 0:
        raise SystemExit(f"the uninterrupted run ended with exit code {code}:\n{reference.output()[-2000:]}")
    while used < kills:
        workdir = folder / f"killed-{used}"
        used += max(1, run_with_kills(reference.workdir, workdir, options, moments, report, min(kills - used, 8)))
        print(f"{used} kills:\n{report.markdown()}\n", flush=True)
    return report


def main(arguments: list[str]) -> int:
    """Prints and writes the report; returns the exit code."""
    options, rest = tyro.cli(Options, args=arguments, description=__doc__, return_unknown_args=True)
    train_options = rest or TRAIN_OPTIONS
    with tempfile.TemporaryDirectory() as folder:
        report = run(options.kills, options.seed, train_options, Path(folder))
    written = {**environment(), "options": " ".join(train_options), **dataclasses.asdict(report)}
    (ROOT / options.output).write_text(json.dumps(written, indent=2) + "\n")
    print(*report.mismatches, sep="\n")
    return bool(report.mismatches)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
