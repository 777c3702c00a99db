"""Timing: alternating runs of two implementations, their medians, and the machine and versions behind the figures."""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import jax

from benchmarks.sizes import Work

RESULTS = Path(__file__).parent / "results"


def has(module: str) -> bool:
    """Whether a module can be imported."""
    return importlib.util.find_spec(module) is not None


HAS_TORCH = has("torch")


class Row(TypedDict):
    """One row of a table; `theirs`, `ratio` and `spread` are None if the baseline was not measured."""

    name: str
    ours: float
    theirs: float | None
    ratio: float | None  # above 1 where ours is better
    unit: str
    spread: tuple[float, float] | None  # lowest and highest ratio of paired runs
    target: str  # "" if there is none
    commit: str
    date: str


class Seconds(NamedTuple):
    """The time of a run."""

    wall: float
    processor: float  # of all threads, which other programs on the machine disturb less


def timed(work: Work) -> Seconds:
    """Does the work once."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.perf_counter() - wall, time.process_time() - processor)


def run_times(work: Work, repeats: int) -> list[Seconds]:
    """The times of several runs after one that is not measured, in which programs are compiled."""
    return [timed(work) for _ in range(repeats + 1)][1:]


def compare(ours: Work, theirs: Work | None, repeats: int, warm_up: bool = True) -> tuple[list[float], list[float]]:
    """Seconds of the runs of each, which alternate; the second list is empty without `theirs`.

    Args:
        ours: our work.
        theirs: the baseline's work, or None to measure only ours.
        repeats: number of measured runs of each.
        warm_up: whether each first runs once without being measured, for example to compile.
    """
    seconds: tuple[list[float], list[float]] = [], []
    for repeat in range(0 if warm_up else 1, repeats + 1):
        for times, work in zip(seconds, (ours, theirs), strict=True):
            if work is not None:
                taken = timed(work).wall
                if repeat > 0:
                    times.append(taken)
    return seconds


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """XLA's temporary memory of a compiled program, per device."""
    analysis: Any = compiled.memory_analysis()
    return analysis.temp_size_in_bytes


def make_row(
    name: str, seconds: tuple[list[float], list[float]], *, amount: float | None, unit: str, target: str = ""
) -> Row:
    """A row of a table from the seconds of paired runs.

    Args:
        name: title of the row.
        seconds: seconds of our runs and of theirs, or another cost such as bytes; theirs may be empty.
        amount: work in one run, for example its number of patches; None to report the costs themselves.
        unit: unit of the row's values, such as "patches/s" or "s".
        target: the ratio or value to reach.
    """
    values = [statistics.median(times) if times else None for times in seconds]
    if amount is not None:
        values = [amount / value if value else None for value in values]
    ratios = [b / a for a, b in zip(*seconds, strict=False)]
    spread = (min(ratios), max(ratios)) if ratios else None
    ratio = statistics.median(ratios) if ratios else None
    mine, theirs = values
    assert mine is not None
    now = _now()
    return Row(
        name=name,
        target=target,
        ours=mine,
        theirs=theirs,
        ratio=ratio,
        unit=unit,
        spread=spread,
        commit=now["commit"],
        date=now["date"],
    )


def environment() -> dict[str, Any]:
    """The machine, the versions and the commit that were measured."""
    versions = {}
    for package in ("jax", "jaxlib", "flax", "optax", "torch", "torchvision", "faiss-cpu", "libtpu"):
        if has(package.split("-")[0]):
            versions[package] = importlib.metadata.version(package)
    return {
        "device": jax.devices()[0].device_kind if jax.default_backend() != "cpu" else _cpu_name(),
        "num_devices": jax.device_count(),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        **_now(),
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    vectors = [name for name in ("avx512f", "avx2") if name in fields.get("flags", "").split()]
    return f"{fields.get('model name', platform.machine())}, {os.cpu_count()} cores, {', '.join(vectors[:1])}"


def _now() -> dict[str, str]:
    return {"commit": _commit(), "date": datetime.datetime.now(datetime.UTC).date().isoformat()}


def _commit() -> str:
    """Short hash of the commit, with + if tracked files differ from it; "unknown" outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes a result and its environment as JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"environment": environment(), **content}, indent=2) + "\n")
    temporary.replace(path)


def markdown(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| what | empssl_jax | PyTorch | unit | ratio (lowest to highest) | target |", "| --- " * 6 + "|"]
    for row in rows:
        ratio = "not measured"
        if row["ratio"] is not None and row["spread"] is not None:
            ratio = "**{:.2f}** ({:.2f} to {:.2f})".format(row["ratio"], *row["spread"])
        theirs = "-" if row["theirs"] is None else _short(row["theirs"])
        lines.append(
            f"| {row['name']} | {_short(row['ours'])} | {theirs} | {row['unit']} | {ratio} | {row['target']} |"
        )
    return "\n".join(lines) + "\n"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
