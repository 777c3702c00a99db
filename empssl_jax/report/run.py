"""What a run's folder holds, read for the report; what is missing or damaged is left out."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from empssl_jax.config import Config
from empssl_jax.config.errors import UserError
from empssl_jax.data.datasets import SPLITS, ImageDataset, Split
from empssl_jax.evaluation.embeddings import LabelledEmbeddings, labelled, load_embeddings
from empssl_jax.run_folder.metrics import PROBE_FILE
from empssl_jax.run_folder.results import Accuracy, load_results
from empssl_jax.run_folder.step_files import read_steps
from empssl_jax.run_folder.timing import TIMING_FILE

METRICS = ("loss", "coding_rate", "coding_rate_fraction", "similarity", "learning_rate")
WINDOW = 10  # steps that the throughput is taken over, as the progress bar does


class Run(NamedTuple):
    """A run of train.py."""

    folder: Path
    config: Config
    steps: Float[np.ndarray, " S"]
    metrics: dict[str, Float[np.ndarray, " S"]]  # METRICS, "seconds" and "throughput"; NaN where not known
    devices: str | None  # as "8 x NVIDIA H100"
    probes: list[dict[str, float]]  # each with "step", "seconds" and "top1"
    results: dict[str, Accuracy]
    embeddings: dict[Split, LabelledEmbeddings] | None
    datasets: dict[str, ImageDataset] | None  # "train", and of "bank" and "test" the images that have a label
    class_names: list[str]

    @property
    def num_images(self) -> dict[Split, int]:
        """Images of each split, as far as they are known."""
        known: dict[Any, Any] = self.datasets or self.embeddings or {}
        return {split: len(known[split].labels) for split in SPLITS if split in known}

    @property
    def last_step(self) -> int | None:
        """Steps of the whole run, None if the number of training images is not known."""
        if "train" not in self.num_images:
            return None
        return self.num_images["train"] // self.config.training.batch_size * self.config.training.max_epochs


def read_run(folder: Path, config: Config, datasets: dict[str, ImageDataset] | None) -> Run:
    """Reads what train.py and eval.py have left in a folder; raises UserError if results.json is damaged.

    Embeddings that are missing or damaged are left out, and so are images that are not those of the embeddings.
    """
    lines, times = read_steps(folder / "metrics.jsonl"), read_steps(folder / TIMING_FILE)
    seconds = {line["step"]: _number(line.get("seconds")) for line in times}
    metrics = {name: np.array([_number(line.get(name)) for line in lines]) for name in METRICS}
    metrics["seconds"] = np.array([seconds.get(line["step"], math.nan) for line in lines])
    steps = np.array([line["step"] for line in lines], float)
    patches_per_step = config.training.batch_size * config.patches.train_patches
    metrics["throughput"] = patches_per_step * _steps_per_second(steps, metrics["seconds"])
    embeddings = _embeddings(folder)
    if embeddings and datasets:
        datasets = _of_the_embeddings(datasets, embeddings)
    embeddings = _with_labels(embeddings)
    return Run(
        folder,
        config,
        steps,
        metrics,
        str(times[-1].get("devices")) if times else None,
        [{name: _number(line.get(name)) for name in ("step", "seconds", "top1")} for line in _probes(folder)],
        load_results(folder),
        embeddings,
        datasets,
        _class_names(datasets or {}, embeddings or {}),
    )


def _steps_per_second(steps: Float[np.ndarray, " S"], seconds: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    """Over the ten steps before each; NaN at the first, which compiles, and where the seconds are not known."""
    rates = np.full(len(steps), math.nan)
    for i in range(1, len(rates)):
        first = max(0, i - WINDOW + 1)
        elapsed = seconds[i] - seconds[first]
        if elapsed > 0:
            rates[i] = (steps[i] - steps[first]) / elapsed
    return rates


def _probes(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_steps(folder / PROBE_FILE) if math.isfinite(_number(line.get("top1")))]


def _embeddings(folder: Path) -> dict[Split, LabelledEmbeddings] | None:
    try:
        train, test = (load_embeddings(folder / "embeddings" / f"{split}.npz") for split in ("train", "test"))
    except UserError:
        return None
    return {"train": train, "test": test} if train.embeddings.shape[1] == test.embeddings.shape[1] else None


def _of_the_embeddings(
    datasets: dict[str, ImageDataset], embeddings: dict[Split, LabelledEmbeddings]
) -> dict[str, ImageDataset] | None:
    """The images, of bank and test those that have a label; None if the embeddings are of others."""
    found = dict(datasets)
    for split, name in zip(SPLITS, ("bank", "test"), strict=True):
        dataset = datasets[name]
        if len(dataset.labels) != len(embeddings[split].labels):
            return None
        kept = np.flatnonzero(dataset.labels >= 0)
        if len(kept) < len(dataset.labels):
            found[name] = dataset.take(kept)
    return found


def _with_labels(embeddings: dict[Split, LabelledEmbeddings] | None) -> dict[Split, LabelledEmbeddings] | None:
    """The embeddings whose images have a label; None if a split has none."""
    if embeddings is None:
        return None
    kept: dict[Split, LabelledEmbeddings] = {split: labelled(held) for split, held in embeddings.items()}
    return kept if all(len(held.labels) for held in kept.values()) else None


def _class_names(*known: Mapping[Any, ImageDataset | LabelledEmbeddings]) -> list[str]:
    """What the data set calls its classes, in UTF-8 also where they are folders whose names are not."""
    names = max((held.class_names for splits in known for held in splits.values()), key=len, default=())
    return [name.encode(errors="replace").decode() for name in names]


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
