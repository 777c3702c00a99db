"""Compares choices of training and embedding in small runs, one factor at a time, without test images.

    python -m experiments.study [--images 45000] [--width 8] [--patches 10] [--rows NAME ...] [--seeds 1 2 3] [--table]

Each run trains a small encoder for one epoch on patches of 16x16 pixels of the first training images of CIFAR-10, and
measures kNN (k = 20, temperature 0.07) on the last 5,000 *training* images. Runs are kept in --folder, so the same
command resumes an interrupted study, and several processes may share the work. Results are appended to
experiments/results/study.jsonl; --table prints those of the given sizes.
"""

import collections
import dataclasses
import functools
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from empssl_jax import training
from empssl_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, PatchConfig, TrainingConfig
from empssl_jax.config.errors import InUseError
from empssl_jax.data.datasets import load_datasets
from empssl_jax.evaluation.embeddings import Embeddings
from empssl_jax.evaluation.evaluate import measure_knn
from empssl_jax.run_folder.workdir import locked
from empssl_jax.runtime.compilation import keep_compiled_programs
from empssl_jax.runtime.devices import device_mesh
from experiments.records import append_line, checkpoint_embeddings, read_lines

BASE = Config(
    data=DataConfig(train_split="train[:5000]", test_split="train[45000:]"),
    patches=PatchConfig(patch_size=16),
    model=ModelConfig(width=16, hidden_dim=1024, projection_dim=256),
    training=TrainingConfig(batch_size=50),
    evaluation=EvaluationConfig(
        valid_crops="grid", valid_patches=16, embedded_layer="stages", cells=2, whiten=True, report=False
    ),
)
Changes = dict[str, Any]
GRID: Changes = {"valid_crops": "grid", "valid_patches": 16}
STAGES: Changes = {"embedded_layer": "stages"}
TRAINING: dict[str, Changes] = {
    "base": {},
    "batch 25": {"batch_size": 25},
    "batch 100": {"batch_size": 100},
    "learning rate 0.1": {"learning_rate": 0.1},
    "learning rate 1": {"learning_rate": 1.0},
    "eta 0.002": {"trust_coefficient": 0.002},
    "eta 0.01": {"trust_coefficient": 0.01},
    "lambda 100": {"invariance_coefficient": 100.0},
    "lambda 400": {"invariance_coefficient": 400.0},
    "eps 0.05": {"coding_rate_eps": 0.05},
    "eps 1": {"coding_rate_eps": 1.0},
    "warm-up 0.1 epochs": {"warmup_epochs": 0.1},
    "crops of 0.15": {"patch_area": 0.15},
    "crops of 0.4": {"patch_area": 0.4},
    "crops of 0.6": {"patch_area": 0.6},
    "projections of 64": {"projection_dim": 64},
    "projections of 1024": {"projection_dim": 1024},
    "10 patches, 2 epochs": {"train_patches": 10, "max_epochs": 2},
    "batch 25, projections of 1024": {"batch_size": 25, "projection_dim": 1024},
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
}


@dataclass(frozen=True)
class Options:
    """The runs to make or to print."""

    # Training images, up to 45,000.
    images: int = 5000
    # Width of the encoder.
    width: int = 16
    # Training patches per image and epoch.
    patches: int = 20
    # Names of the rows to run. Default: all.
    rows: tuple[str, ...] = ()
    # Seeds; each row runs once per seed.
    seeds: tuple[int, ...] = (1, 2, 3)
    # Folder for the runs.
    folder: str = "runs/study"
    # File for the results, one line per run.
    output: str = "experiments/results/study.jsonl"
    # Print the results in that file that have these sizes, and run nothing.
    table: bool = False


def base(options: Options) -> Config:
    """The config of the base runs, which the others differ from."""
    sizes = {"train_split": f"train[:{options.images}]", "width": options.width, "train_patches": options.patches}
    return changed(BASE, sizes)


def changed(config: Config, changes: Changes) -> Config:
    """The config with other values of some options, by name, whichever group they belong to."""
    for field in dataclasses.fields(config):
        group = getattr(config, field.name)
        own = {name: value for name, value in changes.items() if hasattr(group, name)}
        config = dataclasses.replace(config, **{field.name: dataclasses.replace(group, **own)})
    return config


def trained(options: Options, name: str, seed: int) -> Path:
    """Trains a run unless it is complete; returns its folder."""
    sizes = f"{options.images}-{options.width}-{options.patches}"
    workdir = Path(options.folder) / f"{name.replace(' ', '_')}-{sizes}-{seed}"
    run: Changes = {"seed": seed, "workdir": str(workdir), "valid_patches": 0}
    training.train(changed(base(options), TRAINING[name] | run))
    return workdir


def table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table: mean and standard deviation of each row, and the difference from the base runs of its seeds."""
    by_row: dict[str, dict[int, float]] = collections.defaultdict(dict)
    for line in lines:
        by_row[line["row"]][line["seed"]] = 100 * line["top1"]
    text = ["| row | n | kNN top-1, mean (standard deviation) | against the base |", "| --- | --- | --- | --- |"]
    for name, accuracies in by_row.items():
        differences = [accuracies[seed] - by_row["base"][seed] for seed in accuracies if seed in by_row["base"]]
        values = list(accuracies.values())
        spread = f" ({statistics.stdev(values):.1f})" if len(values) > 1 else ""
        difference = f"{statistics.mean(differences):+.1f}" if differences else ""
        text.append(f"| {name} | {len(values)} | {statistics.mean(values):.1f}{spread} | {difference} |")
    return "\n".join(text) + "\n"


def main(options: Options) -> None:
    """Runs what the output file lacks: all rows with the first seed, then with the next."""
    output = Path(options.output)
    sizes = {"images": options.images, "width": options.width, "patches": options.patches}
    if options.table:
        print(table([line for line in read_lines(output) if line.items() >= sizes.items()]), end="")
        return
    datasets, mesh = load_datasets(base(options)), device_mesh()

    @functools.lru_cache(maxsize=1)
    def embeddings(workdir: Path, evaluation: EvaluationConfig) -> Embeddings:
        return checkpoint_embeddings(workdir, evaluation, datasets)

    rows = options.rows or tuple(TRAINING | EVALUATION)
    for seed in options.seeds:
        for name in rows:
            key = sizes | {"row": name, "seed": seed}
            if any(line.items() >= key.items() for line in read_lines(output)):
                continue
            try:
                workdir = trained(options, name if name in TRAINING else "base", seed)
                evaluation = EvaluationConfig(**EVALUATION[name]) if name in EVALUATION else BASE.evaluation
                with locked(workdir):
                    embedded = embeddings(workdir, dataclasses.replace(evaluation, whiten=False))
                    append_line(output, key | measure_knn(embedded, evaluation, mesh))
            except InUseError as error:
                print(error)


if __name__ == "__main__":
    keep_compiled_programs()
    main(tyro.cli(Options, description=__doc__))
