"""Measures all of docs/performance.md on one GPU within a time budget, the most valuable rows first.

    python -m benchmarks.gpu RESULTS [--budget 780] [--rows NAME ...]
    python -m benchmarks.gpu RESULTS --table
    python -m benchmarks.gpu RESULTS --tiny [--budget 1800]

Each row appends a line to RESULTS/gpu.jsonl, so the end of the budget loses nothing, and the same command continues
with the rows that have no line. One process measures our rows, with one compilation cache in RESULTS; if torch is
installed, a second one then measures the rows of the PyTorch baseline. CIFAR-10 must be in $TFDS_DATA_DIR. --tiny
rehearses every row on a CPU with tiny sizes and the built-in digits, in RESULTS/tiny.
"""

import faulthandler
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import tyro

from benchmarks import budget, gpu_rows, gpu_table
from benchmarks.budget import Row
from benchmarks.compare import BENCHMARKS
from benchmarks.gpu_rows import Visit
from benchmarks.measure import HAS_TORCH
from empssl_jax.config.errors import require
from empssl_jax.runtime.compilation import keep_compiled_programs
from empssl_jax.runtime.user_errors import user_errors_exit
from experiments.records import read_lines

GRACE = 5.0  # seconds before the end of the budget, at which rows stop
THEIRS = "theirs_"  # before the names of the baseline's rows
# Rows of both sides; compare.py has their works.
SPEEDS = ("loss", "lars_update", "forward")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    # Folder for the results, the compilation cache and the runs.
    results: tyro.conf.Positional[Path]
    # Seconds, after which the process ends in any case. They count from the end of the imports.
    budget: float = 780.0
    # Names of the rows to measure; those that failed before are measured again. Default: all.
    rows: tuple[str, ...] = ()
    # Rehearse with tiny sizes and the built-in digits.
    tiny: bool = False
    # Print the results as Markdown, and measure nothing.
    table: bool = False
    # Measure only the baseline's rows, as the second process does.
    theirs: bool = False


def our_rows(visit: Visit, reserve: float = 0.0) -> dict[str, Row]:
    """Our rows in the order of their value, with estimates for one H100 that has compiled nothing before.

    The last one takes all the time that is left, except `reserve` seconds.
    """
    accuracy = partial(partial, gpu_rows.accuracy, visit)
    return {
        "train_step": Row(partial(gpu_rows.train_step, visit, visit.sizes.patch_size), 65),
        "profile": Row(partial(gpu_rows.profile, visit, visit.sizes.patch_size), 25),
        "best": Row(accuracy("best"), 110),
        "best_seed_2": Row(accuracy("best_seed_2"), 50),
        "best_seed_3": Row(accuracy("best_seed_3"), 50),
        "best_linear_schedule": Row(accuracy("best_linear_schedule"), 50),
        "best_published": Row(accuracy("best", "random"), 50),
        "default": Row(accuracy("default", "random"), 110),
        "recommended": Row(accuracy("default"), 30),
        "grid": Row(accuracy("default", "grid"), 30),
        "float32": Row(accuracy("float32"), 150),
        "half_batch": Row(accuracy("half_batch"), 100),
        "seed_2": Row(accuracy("seed_2", "random"), 70),
        "seed_2_recommended": Row(accuracy("seed_2"), 20),
        "seed_3": Row(accuracy("seed_3", "random"), 70),
        "seed_3_recommended": Row(accuracy("seed_3"), 20),
        "other_numbers": Row(partial(gpu_rows.other_numbers, visit), 45),
        "small_train_step": Row(partial(gpu_rows.train_step, visit, visit.sizes.small_patch_size), 65),
        "small_profile": Row(partial(gpu_rows.profile, visit, visit.sizes.small_patch_size), 25),
        "flags": Row(partial(gpu_rows.flags, visit), 150),
        "embedding_rates": Row(partial(gpu_rows.embedding_rates, visit), 45),
        **{name: Row(partial(gpu_rows.speed, visit, partial(BENCHMARKS[name].work, "ours")), 15) for name in SPEEDS},
        "ten_epochs": Row(accuracy("ten_epochs"), 190),
        "ten_epochs_published": Row(accuracy("ten_epochs", "random"), 60),
        "best_twenty_epochs": Row(accuracy("best_twenty_epochs"), 170),
        "best_twenty_epochs_linear_schedule": Row(accuracy("best_twenty_epochs_linear_schedule"), 120),
        "best_twenty_epochs_seed_2": Row(accuracy("best_twenty_epochs_seed_2"), 120),
        "best_twenty_epochs_seed_3": Row(accuracy("best_twenty_epochs_seed_3"), 120),
        "best_forty_epochs": Row(accuracy("best_forty_epochs"), 200),
        "best_forty_epochs_seed_2": Row(accuracy("best_forty_epochs_seed_2"), 200),
        "best_forty_epochs_seed_3": Row(accuracy("best_forty_epochs_seed_3"), 200),
        "best_forty_epochs_published": Row(accuracy("best_forty_epochs", "random"), 50),
        "best_100_epochs": Row(accuracy("best_100_epochs"), 450),
        "pretrained_100_epochs": Row(accuracy("pretrained_100_epochs"), 300),
        "thirty_epochs": Row(accuracy("thirty_epochs"), 420),
        "thirty_epochs_published": Row(accuracy("thirty_epochs", "random"), 60),
        "golden": Row(partial(gpu_rows.golden_tests, visit), 60),
        "study": Row(partial(gpu_rows.recipe_study, visit, reserve), reserve + 60),
    }


def their_rows(visit: Visit) -> dict[str, Row]:
    """The rows of the PyTorch baseline, without and with what is easily added to it. Needs torch to be measured."""
    names = {name: BENCHMARKS[name] for name in ("train_step", *reversed(SPEEDS))}
    speed = partial(partial, gpu_rows.speed, visit)
    return {
        **{THEIRS + name: Row(speed(partial(benchmark.work, "theirs")), 20) for name, benchmark in names.items()},
        THEIRS + "helped_train_step": Row(speed(gpu_rows.helped_train_step), 60),
        THEIRS + "end_to_end": Row(partial(gpu_rows.their_end_to_end, visit), 300),
    }


def main(options: Options) -> None:
    """Measures what is missing, first our rows, then the baseline's in another process; or prints the table.

    Raises:
        SystemExit: with status 1, if a row has failed or is still missing.
    """
    results = options.results.absolute() / "tiny" if options.tiny else options.results.absolute()
    visit = Visit(results, options.tiny, time.monotonic() + options.budget - GRACE)
    path, theirs = results / "gpu.jsonl", their_rows(visit)
    wanted = budget.missing(theirs, path, options.rows) if HAS_TORCH else []
    mine = our_rows(visit, reserve=sum(theirs[name].estimate for name in wanted))
    require(set(options.rows) <= {*mine, *theirs}, "rows", options.rows, f"choose from {', '.join((*mine, *theirs))}")
    if options.table:
        print(gpu_table.table(read_lines(path), visit.sizes))
        return
    require(options.budget > GRACE, "budget", options.budget, f"give more than {GRACE:.0f} seconds")
    results.mkdir(parents=True, exist_ok=True)
    faulthandler.dump_traceback_later(options.budget, exit=True)  # even if a program compiles at that moment
    jax.config.update("jax_compilation_cache_dir", str(results / "compilation_cache"))
    keep_compiled_programs()
    # Processes that run one after the other share the GPU, and none may reserve its memory.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    budget.run(theirs if options.theirs else mine, path, visit.left, options.rows, visit.patience)
    if wanted and not options.theirs and visit.left() > GRACE:
        _measure_theirs(visit)
    everything = (theirs if options.theirs else mine) | (theirs if HAS_TORCH or options.rows else {})
    if lacking := budget.missing(everything, path, options.rows or tuple(everything)):
        print(f"not measured: {', '.join(lacking)}")
        raise SystemExit(1)


def _measure_theirs(visit: Visit) -> None:
    """Measures the baseline's rows in a process of their own, as torch and JAX slow each other down."""
    command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--theirs", "--budget", str(visit.left())]
    try:
        subprocess.run(command, timeout=max(0.0, visit.left()))
    except subprocess.TimeoutExpired:
        print("the baseline's process was stopped at the end of the budget")


if __name__ == "__main__":
    with user_errors_exit():
        main(tyro.cli(Options, description=__doc__))
