"""Kills training at random moments until it has finished, and compares it with a run that was left alone.

    python -m tests.stress.faults [--kills 50] [--seed 0] [--output FILE] [options of train.py]

Moments are of three kinds: between two steps, while a checkpoint is being written, and while the trained encoder embeds
the images; every fourth of the first kind is a SIGTERM, all others are SIGKILL. The interrupted run starts again until
it is done; then parameters, BatchNorm statistics, optimizer state, metrics.jsonl, embeddings and results must be those
of the uninterrupted run, bit for bit. Runs are repeated in new folders until all kills are used up.
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
    """How often, and what is killed."""

    kills: int = 50
    """Kills in all."""
    seed: int = 0
    """Decides the moments."""
    output: str = "tests/stress/results/faults.json"
    """File that receives the report."""


@dataclass
class Report:
    """What was done to the runs and what came of it."""

    kills: dict[str, int] = field(default_factory=lambda: {STEPS: 0, SAVE: 0, EMBEDDING: 0})
    terminations: int = 0  # SIGTERMs, each answered by one more step at most, a save and exit code 143
    runs: int = 0
    resumed: int = 0
    steps_repeated: int = 0
    mismatches: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The report as a table."""
        rows = {f"SIGKILL {moment}": count for moment, count in self.kills.items()}
        rows |= {"SIGTERM between steps": self.terminations, "runs brought to their end": self.runs}
        rows |= {"resumptions": self.resumed, "steps made twice": self.steps_repeated}
        rows |= {"differences from the uninterrupted run": len(self.mismatches)}
        return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


class Victim:
    """A running train.py whose progress is read off its folder; it prints into a file beside that.

    Args:
        workdir: folder of the run.
        options: other options of train.py.
    """

    def __init__(self, workdir: Path, options: list[str]):
        self.workdir, self._log = workdir, workdir.with_name(workdir.name + ".log")
        # What JAX and tests have set for their own process is not for this one.
        inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        command = [sys.executable, "train.py", *options, "--workdir", str(workdir)]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=inherited, stdout=log, stderr=subprocess.STDOUT)

    def steps(self) -> int:
        """Steps in metrics.jsonl."""
        path = self.workdir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written."""
        folder = self.workdir / "checkpoints"
        return folder.exists() and any("tmp" in path.name for path in folder.iterdir())

    def output(self) -> str:
        """What it has printed."""
        return self._log.read_text()

    def wait_for(self, reached: Callable[[], bool]) -> bool:
        """Waits until something is reached, or the process has ended; says whether it was reached."""
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


def harass(whole: Path, workdir: Path, options: list[str], moments: random.Random, report: Report, kills: int) -> int:
    """Runs train.py in a folder to its end, with at most `kills` kills; compares it with the run in `whole`.

    Returns the kills used up.
    """
    steps_in_all = len((whole / "metrics.jsonl").read_text().splitlines())
    for kill in range(kills + 1):
        victim = Victim(workdir, options)
        before = victim.steps()
        if kill < kills and (before < steps_in_all or moments.random() < 0.5):
            strike(victim, before >= steps_in_all, moments, report)
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
    report.mismatches += differences(whole, workdir)
    return kill


def strike(victim: Victim, trained: bool, moments: random.Random, report: Report) -> None:
    """Ends a process at a random moment, unless it comes to its end before."""
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
    """SIGTERM: one more step at most, a save of it, and exit code 143."""
    before = victim.steps()
    code = victim.end(signal.SIGTERM)
    if "stopped and saved" not in victim.output():
        return  # it came before the first step or after the last
    report.terminations += 1
    stopped = int(victim.output().split("stopped and saved at step ")[1].split()[0])
    newest = max(int(path.name) for path in (victim.workdir / "checkpoints").iterdir() if path.name.isdigit())
    # metrics.jsonl is one step behind while training, and the step under way is brought to its end.
    if code != 143 or stopped != newest or stopped != victim.steps() or stopped - before > 2:
        report.mismatches.append(f"SIGTERM at {before} steps: exit code {code}, stopped at {stopped}, saved {newest}")


def differences(whole: Path, other: Path) -> list[str]:
    """What two finished runs do not have in common."""
    found = []
    for name in ("metrics.jsonl", "results.json"):
        if (whole / name).read_text() != (other / name).read_text():
            found.append(f"{other}: {name}")
    for ours, theirs in zip(_checkpoint(whole), _checkpoint(other), strict=True):
        if not np.array_equal(ours, theirs):
            found.append(f"{other}: an array of shape {ours.shape} of the last checkpoint")
    for split in ("train", "test"):
        with (
            np.load(whole / "embeddings" / f"{split}.npz", allow_pickle=False) as ours,
            np.load(other / "embeddings" / f"{split}.npz", allow_pickle=False) as theirs,
        ):
            found += [f"{other}: {split} {name}" for name in ours if not np.array_equal(ours[name], theirs[name])]
    return found


def _checkpoint(workdir: Path) -> list[np.ndarray]:
    """All arrays of the newest checkpoint, read without this package."""
    steps = [path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    newest = max(steps, key=lambda path: int(path.name)).absolute()
    trees = [ocp.StandardCheckpointer().restore(newest / item) for item in ("encoder", "optimizer")]
    return [np.asarray(array) for array in jax.tree.leaves(trees)]


def run(kills: int, seed: int, options: list[str], folder: Path) -> Report:
    """One uninterrupted run and as many interrupted ones as the kills need, in a folder."""
    report, moments, used = Report(), random.Random(seed), 0
    whole = Victim(folder / "whole", options)
    if (code := whole.end()) != 0:
        raise SystemExit(f"the uninterrupted run ended with exit code {code}:\n{whole.output()[-2000:]}")
    while used < kills:
        workdir = folder / f"killed-{used}"
        used += max(1, harass(whole.workdir, workdir, options, moments, report, min(kills - used, 8)))
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
