"""The lines of benchmarks/gpu.py as the Markdown tables of docs/performance.md."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import measure, profile_table
from benchmarks.compare import BENCHMARKS
from benchmarks.sizes import Sizes

Line = Mapping[str, Any]


def _milliseconds(line: Line) -> float:
    """The median of its runs."""
    return 1e3 * statistics.median(line["run_seconds"])


def _train_step(line: Line) -> str:
    rate = f"the rate of a matrix product ({line['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s)"
    speed = f"{line['patches_per_second']:,.0f} patches/s"
    return f"{_milliseconds(line):.1f} ms, {speed}, {line['fraction_of_matmul']:.0%} of {rate}"


def _first_step(line: Line) -> str:
    cached = line["programs_cached_before"]
    return f"{line['first_step_seconds']:.1f} s" + (f", {cached} files cached before" if cached else "")


def _flags(line: Line) -> str:
    parts = ((name, row["first_step_seconds"], _milliseconds(row)) for name, row in line["flags"].items())
    return "; ".join(f"{name}: {first:.0f} s, step {step:.1f} ms" for name, first, step in parts)


def _rates(line: Line) -> str:
    return " / ".join(f"{rate:,.0f}" for rate in line["patches_per_second"].values()) + " patches/s"


def _seconds(line: Line) -> str:
    return f"{line['seconds']:.0f} s"


def _tests(line: Line) -> str:
    return f"{line['passed']} passed, {line['failed']} failed"


# What each row shows, and the goal.
GOALS: dict[str, tuple[str, str, Callable[[Line], str]]] = {
    "train step": ("train_step", "17.5 ms, 114,000 patches/s, 50 %", _train_step),
    "the same with patches of 16x16": ("small_train_step", "", _train_step),
    "first step, nothing cached": ("train_step", "20 s", _first_step),
    "first step with flags of XLA, nothing cached": ("flags", "20 s", _flags),
    "first step with another seed": ("other_numbers", "5 s", lambda line: f"{line['seed_seconds']:.1f} s"),
    "first step with another learning rate": (
        "other_numbers",
        "5 s",
        lambda line: f"{line['learning_rate_seconds']:.1f} s",
    ),
    "one epoch, 128-patch embeddings, kNN and linear classifier": ("default", "60 s", _seconds),
    "ten epochs and evaluation": ("ten_epochs", "100 s", _seconds),
    "embedding of 16 patches, 250 / 1,000 / 2,500 images at a time": ("embedding_rates", "400,000", _rates),
    "golden tests on the device": ("golden", "0 failed", _tests),
}


def table(lines: Sequence[Line], size: Sizes) -> str:
    """All tables, from the last line of each row that succeeded."""
    found = {line["row"]: line for line in lines if "error" not in line}
    failed = {line["row"]: line["error"] for line in lines if line["row"] not in found}
    parts = [_environment(lines), _goals(found), _against_pytorch(found, size), _accuracies(found)]
    for row in ("profile", "small_profile"):
        if kernels := found.get(row, {}).get("kernels"):
            kinds = {name: profile_table.Kind(**kind) for name, kind in kernels.items()}
            parts.append(f"Kernels of the train step (row {row}):\n\n{profile_table.table(kinds)}")
    parts.append("\n".join(f"{name} failed: {error}" for name, error in failed.items()))
    return "\n\n".join(part for part in parts if part)


def _environment(lines: Sequence[Line]) -> str:
    """The devices, versions and commits of all lines."""
    seen = {
        f"{line['device']}, jax {line['versions']['jax']}, torch {line['versions'].get('torch', '-')}, "
        f"commit {line['commit']}, {line['date']}."
        for line in lines
    }
    return "\n".join(sorted(seen))


def _goals(found: Mapping[str, Line]) -> str:
    text = ["| what | measured | goal |", "| --- | --- | --- |"]
    for title, (row, goal, show) in GOALS.items():
        text.append(f"| {title} | {show(found[row]) if row in found else 'not measured'} | {goal} |")
    return "\n".join(text)


def _against_pytorch(found: Mapping[str, Line], size: Sizes) -> str:
    """Ratios of the rows that both sides have. The runs do not alternate, as each side has its own process."""

    def seconds(name: str) -> list[float]:
        return found[name].get("run_seconds") or [found[name]["seconds"]]

    names = {name: (name, f"theirs_{name}") for name in ("train_step", "forward", "loss", "lars_update")}
    rows = [
        BENCHMARKS[name].row((seconds(mine), seconds(theirs)), size)
        for name, (mine, theirs) in names.items()
        if mine in found and theirs in found
    ]
    if {"train_step", "theirs_helped_train_step"} <= found.keys():
        row = BENCHMARKS["train_step"].row((seconds("train_step"), seconds("theirs_helped_train_step")), size)
        rows.insert(1, row | {"name": "the same, theirs with torch.compile and B x B determinants"})  # type: ignore[arg-type]
    if {"default", "theirs_end_to_end"} <= found.keys():
        title = "one epoch, 128-patch embeddings, kNN and linear classifier"
        rows.append(measure.make_row(title, (seconds("default"), seconds("theirs_end_to_end")), amount=None, unit="s"))
    return measure.markdown(rows).strip() if rows else ""


def _accuracies(found: Mapping[str, Line]) -> str:
    measures = ("kNN", "linear", "logistic")
    text = [f"| run | {' | '.join(measures)} | seconds of training, embedding, measuring |", "| --- " * 5 + "|"]
    for name, line in found.items():
        if "kNN" in line:
            parts = [line.get(f"{part}_seconds") for part in ("training", "embedding", "measuring")]
            shown = ", ".join("-" if part is None else f"{part:.1f}" for part in parts)
            cells = [f"{line[measure]:.2f}" if measure in line else "-" for measure in measures]
            text.append(f"| {name} | {' | '.join(cells)} | {shown} |")
    return "\n".join(text) if len(text) > 2 else ""
