"""Measures empssl_jax against a plain PyTorch version of the same work, in alternating runs.

    pip install -e ".[bench]"
    python -m benchmarks.compare [--only train_step lars_update] [--output FILE.json]

Prints a Markdown table, and writes it and a JSON file after each row. A later call replaces the rows that it measures
and keeps the others. Without torch, only empssl_jax is measured. Both sides start from data on the device, except that
images become patches inside empssl_jax's compiled programs and in the baseline's DataLoader workers. The baseline's
train step starts from ready patches.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import tyro

from benchmarks import limits, measure, sizes
from benchmarks.measure import HAS_TORCH, RESULTS, Row
from benchmarks.sizes import Sizes, Work
from empssl_jax.config.errors import require
from empssl_jax.runtime.user_errors import user_errors_exit


@dataclass(frozen=True)
class Benchmark:
    """A row of the table, measured by the functions of the same name in ours.py and theirs.py."""

    title: str
    function: str
    argument: str | None = None  # field of Sizes that the functions get as a second argument
    amount: Callable[[Sizes], float] | None = None  # patches in a run; None for a row in seconds
    target: str = ""
    is_long: bool = False  # takes minutes on two cores

    def work(self, side: Literal["ours", "theirs"], size: Sizes) -> Work:
        """The work of one side, whose module is imported here: theirs needs torch."""
        arguments = (size,) if self.argument is None else (size, getattr(size, self.argument))
        return getattr(importlib.import_module(f"benchmarks.{side}"), self.function)(*arguments)

    def row(self, seconds: tuple[list[float], list[float]], size: Sizes) -> Row:
        """The row of the table, from the seconds of our runs and of theirs."""
        amount = self.amount(size) if self.amount else None
        unit = "patches/s" if self.amount else "s"
        return measure.make_row(self.title, seconds, amount=amount, unit=unit, target=self.target)


BENCHMARKS = {
    "augmentation": Benchmark(
        "augmentation, all cores or the device",
        "augmentation",
        amount=lambda s: s.augmented_images * s.patches,
        target="10 on 2 CPU cores",
    ),
    "loss": Benchmark("loss and gradient, P=20 B=100 D=1024", "loss_and_gradient", "loss_images", target="20"),
    "more_loss": Benchmark("loss and gradient, P=20 B=1000 D=1024", "loss_and_gradient", "more_loss_images"),
    "lars_update": Benchmark("LARS update, full model", "lars_update", target="2"),
    "forward": Benchmark("forward pass, full model", "forward", amount=lambda s: s.images * s.patches),
    "train_step": Benchmark(
        "train step, full model",
        "train_step",
        "patch_size",
        amount=lambda s: s.images * s.patches,
        target="1.25 on CPU, 2 on GPU",
    ),
    "small_train_step": Benchmark(
        "train step at patch size 16, theirs at 32",
        "train_step",
        "small_patch_size",
        amount=lambda s: s.images * s.patches,
        target="4",
    ),
    "linear_probe": Benchmark("linear probe, 5 epochs of 10k x 4096", "linear_probe", target="3"),
    "knn": Benchmark("kNN, 10k queries, bank of 50k x 4096", "knn_scores", target="3", is_long=True),
    "faiss": Benchmark("kNN, theirs by faiss on CPU, without the vote", "faiss_search", is_long=True),
    "embedding": Benchmark(
        "embeddings, 1,000 images of 16 patches",
        "embedding",
        amount=lambda s: s.embedded_images * s.embedded_patches,
        is_long=True,
    ),
}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    # Names of the rows to measure.
    only: tuple[str, ...] = (*BENCHMARKS, "start", "limits")
    # Sizes of the work: auto suits the device, TINY is for a rehearsal.
    size: Literal["auto", "TINY"] = "auto"
    # JSON file to write. The table is written beside it, with the suffix .md.
    output: Path = RESULTS / "compare.json"


def run(benchmark: Benchmark, size: Sizes) -> Row:
    """Measures a row."""
    repeats = size.long_repeats if benchmark.is_long else size.repeats
    # A warm-up of a long row takes minutes and would remove only seconds of compilation.
    baseline = benchmark.work("theirs", size) if HAS_TORCH else None
    seconds = measure.compare(benchmark.work("ours", size), baseline, repeats, warm_up=not benchmark.is_long)
    return benchmark.row(seconds, size)


def start_up(size_name: str) -> Iterator[Row]:
    """Rows of new processes that make one train step: ours with an empty and a filled compilation cache, and theirs."""

    def first_step(side: str, cache: str) -> dict[str, float]:
        command = [sys.executable, "-m", "benchmarks.first_step", side, size_name]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
        return json.loads(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)

    with tempfile.TemporaryDirectory() as cache:
        cold, warm = first_step("ours", cache), first_step("ours", cache)
    baseline = first_step("theirs", "") if HAS_TORCH else None

    def row(name: str, key: str, mine: dict[str, float], *, unit: str, scale: float = 1.0, target: str = "") -> Row:
        theirs = [baseline[key] * scale] if baseline and baseline[key] else []
        return measure.make_row(name, ([mine[key] * scale], theirs), amount=None, unit=unit, target=target)

    step, compiled, cached = "start of Python to the end of the first step", "compilation of the train step", "cached"
    yield row(f"{step}, nothing compiled", "seconds", cold, unit="s")
    yield row(f"{step}, {cached}", "seconds", warm, unit="s")
    yield row(compiled, "compilation_seconds", cold, unit="s", target="at most 10 s on 2 cores")
    yield row(f"{compiled}, {cached}", "compilation_seconds", warm, unit="s", target="at most 2 s")
    yield row("peak host memory of that process", "host_bytes", cold, unit="GB", scale=1e-9)
    if cold["device_bytes"]:
        yield row("peak device memory of that process", "device_bytes", cold, unit="GB", scale=1e-9)


def main(options: Options) -> None:
    """Measures the rows and writes them."""
    names = (*BENCHMARKS, "start", "limits")
    require(set(options.only) <= set(names), "only", options.only, f"choose from {', '.join(names)}")
    size_name = options.size if options.size != "auto" else "CPU" if jax.default_backend() == "cpu" else "ACCELERATOR"
    size: Sizes = getattr(sizes, size_name)
    previous = json.loads(options.output.read_text()) if options.output.exists() else {}
    content = {"rows": previous.get("rows", {}), "limits": previous.get("limits", {})}

    def write(name: str, row: Row) -> None:
        content["rows"][name] = row
        measure.write(options.output, content)
        options.output.with_suffix(".md").write_text(measure.markdown(content["rows"].values()))
        print(measure.markdown([row]).splitlines()[-1], flush=True)

    for name, benchmark in BENCHMARKS.items():
        if name in options.only and (name != "faiss" or measure.has("faiss")):
            write(name, run(benchmark, size))
    if "start" in options.only:
        for row in start_up(size_name):
            write(row["name"], row)
    if "limits" in options.only:
        content["limits"] = limits.measure(size)
        measure.write(options.output, content)
    print(options.output.with_suffix(".md").read_text())


if __name__ == "__main__":
    with user_errors_exit():
        main(tyro.cli(Options, description=__doc__))
