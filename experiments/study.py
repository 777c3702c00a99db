"""Compares choices of training and embedding, one factor at a time, without test images.

    python -m experiments.study [--size short|long|full|best|tiny] [--rows NAME ...] [--seeds 1 2 3] [--table]

Each run trains on the first training images of CIFAR-10, for one epoch unless the text says otherwise. kNN (k = 20,
temperature 0.07) and the linear classifier are measured on the last 5,000 *training* images. The sizes are:

short   width 16, patches of 16x16, 5,000 images, 100 steps
long    the same with 45,000 images, 900 steps
full    the paper's encoder and batches, 45,000 images: for a GPU
best    the same with patches of 16x16 and four epochs, as in configs/cifar10_best.py
tiny    5 steps on built-in digits, a rehearsal: its accuracies mean nothing

One process makes all runs, rows in the order of their value, and compiles programs once where their shapes agree. Runs
are kept in --folder, so the same command resumes an interrupted study, and several processes may share the work.
Results are appended to experiments/results/study.jsonl; --table prints those of one size.
"""

import collections
import dataclasses
import functools
import itertools
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from benchmarks.measure import environment
from empssl_jax import training
from empssl_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, PatchConfig, TrainingConfig
from empssl_jax.config.config_files import read_config_file
from empssl_jax.config.errors import InUseError
from empssl_jax.data.datasets import load_datasets
from empssl_jax.evaluation.embeddings import Embeddings
from empssl_jax.run_folder.step_files import TIMING_FILE, read_steps
from empssl_jax.run_folder.workdir import locked
from empssl_jax.runtime.compilation import keep_compiled_programs
from empssl_jax.runtime.memory import keep_freed_memory
from experiments.records import RESULTS, accuracies, append_line, checkpoint_embeddings, read_lines

RECIPE = read_config_file("cifar10_best")
# Without hidden features, which narrow encoders do not gain from, and without mirrored images, which help any encoder.
RECOMMENDED = dataclasses.replace(
    RECIPE.evaluation, embedded_layer="stages", mirror=False, logistic=False, report=False
)
FULL = Config(data=DataConfig(train_split="train[:45000]", test_split="train[45000:]"), evaluation=RECOMMENDED)
LONG = dataclasses.replace(
    FULL,
    patches=PatchConfig(patch_size=16),
    model=ModelConfig(width=16, hidden_dim=1024, projection_dim=256),
    training=TrainingConfig(batch_size=50),
)
SHORT = dataclasses.replace(LONG, data=dataclasses.replace(LONG.data, train_split="train[:5000]"))
BEST = dataclasses.replace(FULL, patches=RECIPE.patches, training=RECIPE.training)
TINY = dataclasses.replace(
    LONG,
    data=DataConfig(dataset="digits", images_per_class=10, test_images_per_class=5),
    training=TrainingConfig(batch_size=20),
)
SIZES = {"short": SHORT, "long": LONG, "full": FULL, "best": BEST, "tiny": TINY}

Changes = dict[str, Any]
RELATIVE = ("batch_size", "max_epochs")


class Experiment(NamedTuple):
    """A change of the training and what we expect of it, written before it ran: points of kNN top-1 at full size."""

    changes: Changes
    prediction: str


GRID: Changes = {"valid_crops": "grid", "valid_patches": 16}
WHOLE: Changes = {"valid_crops": "whole", "valid_patches": 1}
BOTH: Changes = GRID | {"valid_crops": "grid+whole"}
STAGES: Changes = {"embedded_layer": "stages"}
# Batches and epochs are relative to the size's own, so that rows mean the same at every size.
TRAINING = {
    "base": Experiment({}, "0"),
    "linear schedule": Experiment({"schedule": "linear"}, "+0.8, as in long runs"),
    "half the batch": Experiment({"batch_size": 0.5}, "+1: twice as many steps"),
    "10 patches, twice the epochs": Experiment({"train_patches": 10, "max_epochs": 2.0}, "+0.8, as in long runs"),
    "half the batch, 10 patches, twice the epochs": Experiment(
        {"batch_size": 0.5, "train_patches": 10, "max_epochs": 2.0}, "+1: four times as many steps"
    ),
    "quarter of the batch": Experiment({"batch_size": 0.25}, "0: the coding rate of few images is noisy"),
    "patches of 16x16, 4 times the epochs": Experiment(
        {"patch_size": 16, "max_epochs": 4.0}, "+1 in about the same time"
    ),
    "learning rate 0.5": Experiment({"learning_rate": 0.5}, "0"),
    "eta 0.01": Experiment({"trust_coefficient": 0.01}, "0"),
    "momentum 0.95": Experiment({"momentum": 0.95}, "-0.5"),
    "lambda 100": Experiment({"invariance_coefficient": 100.0}, "-1"),
    "lambda 400": Experiment({"invariance_coefficient": 400.0}, "-0.5"),
    "eps 0.05": Experiment({"coding_rate_eps": 0.05}, "0"),
    "projections of 512": Experiment({"projection_dim": 512}, "0"),
    "warm-up 0.1 epochs": Experiment({"warmup_epochs": 0.1}, "-0.5"),
    "double the batch": Experiment({"batch_size": 2.0}, "-3: half as many steps"),
}
# Other embeddings of the base runs. Consecutive rows that differ only in whitening share one computation.
EVALUATION: dict[str, Changes] = {
    "as in training, 1 patch": {"valid_patches": 1},
    "as in training, 4 patches": {"valid_patches": 4},
    "as in training, 16 patches": {"valid_patches": 16},
    "as in training, 16 patches, whitened": {"valid_patches": 16, "whiten": True},
    "as in training, 64 patches": {"valid_patches": 64},
    "grid of 1": {"valid_crops": "grid", "valid_patches": 1},
    "grid of 4": {"valid_crops": "grid", "valid_patches": 4},
    "grid of 9": {"valid_crops": "grid", "valid_patches": 9},
    "grid of 16": GRID,
    "grid of 16, whitened": GRID | {"whiten": True},
    "grid of 16, 2x2 cells": GRID | {"cells": 2},
    "grid of 16, 2x2 cells, whitened": GRID | {"cells": 2, "whiten": True},
    "grid of 16, stages": GRID | STAGES,
    "grid of 16, stages, whitened": GRID | STAGES | {"whiten": True},
    "grid of 16, stages, 2x2 cells": GRID | STAGES | {"cells": 2},
    "grid of 16, stages, 4x4 cells, whitened": GRID | STAGES | {"cells": 4, "whiten": True},
    "grid of 25": GRID | {"valid_patches": 25},
    "grid of 36, stages, 2x2 cells, whitened": GRID | STAGES | {"valid_patches": 36, "cells": 2, "whiten": True},
    "whole, stages, 2x2 cells": WHOLE | STAGES | {"cells": 2},
    "whole, stages, 2x2 cells, whitened": WHOLE | STAGES | {"cells": 2, "whiten": True},
    "whole, stages, 4x4 cells, whitened": WHOLE | STAGES | {"cells": 4, "whiten": True},
    "grid of 16, stages, 2x2 cells, whitened": GRID | STAGES | {"cells": 2, "whiten": True},
    "grid of 16 and whole, stages, 2x2 cells": BOTH | STAGES | {"cells": 2},
}


@dataclass(frozen=True)
class Options:
    """The runs to make or to print."""

    # Size of the runs.
    size: Literal["short", "long", "full", "best", "tiny"] = "short"
    # Names of the rows to run. Default: all.
    rows: tuple[str, ...] = ()
    # Seeds; each row runs once per seed.
    seeds: tuple[int, ...] = (1, 2, 3)
    # Type of activations and matrix products, as in train.py.
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # Begin no run after so many seconds.
    budget: float = math.inf
    # Folder for the runs.
    folder: str = "runs/study"
    # File for the results, one line per run.
    output: str = str(RESULTS / "study.jsonl")
    # Print the results in that file that have this size, and run nothing.
    table: bool = False


def changed(config: Config, changes: Changes) -> Config:
    """The config with other values of some options, by name, whichever group they belong to.

    A batch size or number of epochs that is a float multiplies the config's own: 0.5 halves it.
    """
    for field in dataclasses.fields(config):
        group = getattr(config, field.name)
        own = {name: value for name, value in changes.items() if hasattr(group, name)}
        own |= {name: round(own[name] * getattr(group, name)) for name in RELATIVE if isinstance(own.get(name), float)}
        config = dataclasses.replace(config, **{field.name: dataclasses.replace(group, **own)})
        changes = {name: value for name, value in changes.items() if name not in own}
    if changes:
        raise TypeError(f"no group of the config has {', '.join(changes)}")
    return config


def trained(options: Options, name: str, seed: int) -> Path:
    """Trains a run unless it is complete; returns its folder."""
    workdir = Path(options.folder) / f"{name.replace(' ', '_').replace(',', '')}-{options.size}-{seed}"
    run: Changes = {"seed": seed, "workdir": str(workdir), "valid_patches": 0, "precision": options.precision}
    training.train(changed(SIZES[options.size], TRAINING[name].changes | run))
    return workdir


def measure(workdir: Path, embeddings: Embeddings, evaluation: EvaluationConfig, seed: int) -> dict[str, float]:
    """Accuracies in percent, and the seconds of the training."""
    if evaluation.whiten and evaluation != RECOMMENDED:  # for the linear classifier, the row without whitening counts
        evaluation = dataclasses.replace(evaluation, linear_epochs=0)
    measured = {name: round(value, 2) for name, value in accuracies(embeddings, evaluation, seed).items()}
    return measured | {"seconds": round(read_steps(workdir / TIMING_FILE)[-1]["seconds"], 1)}


def table(lines: list[dict[str, Any]], kind: str = "kNN") -> str:
    """A Markdown table: mean and standard deviation of each row, and the difference from the base runs of its seeds."""
    by_row: dict[str, dict[int, float]] = collections.defaultdict(dict)
    for line in lines:
        if kind in line:
            by_row[line["row"]][line["seed"]] = line[kind]
    text = [f"| row | n | {kind} top-1, mean (standard deviation) | against the base |", "| --- | --- | --- | --- |"]
    for name, by_seed in by_row.items():
        differences = [by_seed[seed] - by_row["base"][seed] for seed in by_seed if seed in by_row["base"]]
        values = list(by_seed.values())
        spread = f" ({statistics.stdev(values):.1f})" if len(values) > 1 else ""
        difference = f"{statistics.mean(differences):+.1f}" if differences else ""
        text.append(f"| {name} | {len(values)} | {statistics.mean(values):.1f}{spread} | {difference} |")
    return "\n".join(text) + "\n"


def main(options: Options) -> None:
    """Runs what the output file lacks: all rows with the first seed, then with the next."""
    output, start = Path(options.output), time.monotonic()
    if options.table:
        lines = [line for line in read_lines(output) if line["size"] == options.size]
        print("\n".join(table(lines, kind) for kind in ("kNN", "linear")), end="")
        return
    datasets = load_datasets(SIZES[options.size])

    @functools.lru_cache(maxsize=1)
    def embeddings(workdir: Path, evaluation: EvaluationConfig) -> Embeddings:
        return checkpoint_embeddings(workdir, evaluation, datasets)

    rows = options.rows or tuple(TRAINING | EVALUATION)
    for seed, name in itertools.product(options.seeds, rows):
        key = {"size": options.size, "row": name, "seed": seed}
        done = any(line.items() >= key.items() for line in read_lines(output))
        if done or time.monotonic() - start > options.budget:
            continue
        try:
            workdir = trained(options, name if name in TRAINING else "base", seed)
            evaluation = EvaluationConfig(**EVALUATION[name]) if name in EVALUATION else RECOMMENDED
            with locked(workdir):
                embedded = embeddings(workdir, dataclasses.replace(evaluation, whiten=False))
                append_line(output, key | measure(workdir, embedded, evaluation, seed) | environment())
        except InUseError as error:
            print(error)


if __name__ == "__main__":
    keep_freed_memory()
    keep_compiled_programs()
    main(tyro.cli(Options, description=__doc__))
