"""Reads a run's folder for the report; parts that are missing or damaged are left out."""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from empssl_jax.config import Config
from empssl_jax.config.errors import UserError
from empssl_jax.data.datasets import Datasets, ImageDataset
from empssl_jax.evaluation.embedding_files import load_both_embeddings, read_names
from empssl_jax.evaluation.embeddings import Embeddings, LabelledEmbeddings, labelled
from empssl_jax.method.hyperparameters import count_all_steps
from empssl_jax.run_folder.results import Accuracy, load_results
from empssl_jax.run_folder.saved_config import load_saved_images
from empssl_jax.run_folder.step_files import METRICS_FILE, PROBE_FILE, TIMING_FILE, read_steps

METRICS = ("loss", "coding_rate", "coding_rate_fraction", "similarity", "learning_rate")
PROBED = ("step", "seconds", "top1", "effective_rank")
WINDOW = 10  # steps that the throughput is averaged over, as in the progress bar


class Run(NamedTuple):
    """What the report needs of a run."""

    folder: Path
    config: Config
    steps: Float[np.ndarray, " S"]
    metrics: dict[str, Float[np.ndarray, " S"]]  # METRICS, "seconds" and "throughput"; NaN where unknown
    devices: str | None  # such as "8 x NVIDIA H100"
    probes: list[dict[str, float]]  # each with "step", "seconds", "top1" and "effective_rank"; NaN where unknown
    results: dict[str, Accuracy]
    all_embeddings: Embeddings | None  # of all images
    embeddings: Embeddings | None  # of the images with a label; None if a split has no such image
    datasets: Datasets | None  # `bank` and `test` contain only images with a label
    has_other_images: bool  # than the embedded ones, so `datasets` is None
    class_names: list[str]
    num_train: int | None  # number of training images, with or without a label; None if unknown

    @property
    def class_sizes(self) -> Int[np.ndarray, " K"]:
        """Number of training images with a label in each class that has any."""
        assert self.embeddings is not None
        return np.unique(self.embeddings.bank.labels, return_counts=True)[1]

    @property
    def last_step(self) -> int | None:
        """Number of steps in the whole run; None if the number of training images is unknown."""
        if self.num_train is None:
            return None
        training = self.config.training
        return count_all_steps(self.num_train // training.batch_size, training.max_epochs)


def read_run(folder: Path, config: Config, datasets: Datasets | None) -> Run:
    """Reads the files that `empssl train` and `empssl eval` wrote into a folder.

    Embeddings that are missing or damaged are left out, and so are `datasets` whose images are not the embedded ones.

    Raises:
        UserError: results.json is damaged.
    """
    lines, times = read_steps(folder / METRICS_FILE), read_steps(folder / TIMING_FILE)
    seconds = {line["step"]: _number(line.get("seconds")) for line in times}
    metrics = {name: np.array([_number(line.get(name)) for line in lines]) for name in METRICS}
    metrics["seconds"] = np.array([seconds.get(line["step"], math.nan) for line in lines])
    steps = np.array([line["step"] for line in lines], float)
    patches_per_step = config.training.batch_size * config.patches.train_patches
    metrics["throughput"] = patches_per_step * _steps_per_second(steps, metrics["seconds"])
    saved = folder / "embeddings"
    embeddings = _embeddings(saved, config.evaluation.mirror)
    are_there = datasets is not None
    if embeddings and datasets:
        datasets = _of_the_embeddings(datasets, embeddings, saved)
    with_labels = _with_labels(embeddings)
    return Run(
        folder,
        config,
        steps,
        metrics,
        str(times[-1].get("devices")) if times else None,
        [{name: _number(line.get(name)) for name in PROBED} for line in read_steps(folder / PROBE_FILE)],
        load_results(folder),
        embeddings,
        with_labels,
        datasets,
        are_there and datasets is None,
        _class_names(datasets or (), with_labels or ()),
        _num_train(folder, datasets),
    )


def _steps_per_second(steps: Float[np.ndarray, " S"], seconds: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    """At each step, the mean over up to ten steps; NaN at the first, which includes compilation, and if unknown."""
    rates = np.full(len(steps), math.nan)
    for i in range(1, len(rates)):
        first = max(0, i - WINDOW + 1)
        elapsed = seconds[i] - seconds[first]
        if elapsed > 0:
            rates[i] = (steps[i] - steps[first]) / elapsed
    return rates


def _num_train(folder: Path, datasets: Datasets | None) -> int | None:
    """Number of training images as the run saved it, or else of the images that are available now."""
    with contextlib.suppress(UserError):
        if (saved := load_saved_images(folder).num_train) is not None:
            return saved
    return None if datasets is None else len(datasets.train.labels)


def _embeddings(folder: Path, with_mirrored: bool) -> Embeddings | None:
    try:
        return load_both_embeddings(folder, with_mirrored)
    except UserError:
        return None


def _of_the_embeddings(datasets: Datasets, embeddings: Embeddings, folder: Path) -> Datasets | None:
    """The images, in bank and test only those with a label; None if the embeddings are those of other images."""
    for (split, images), embedded in zip(datasets.embedded, embeddings, strict=True):
        names = read_names(folder / f"{split}.npz")
        if not np.array_equal(images.labels, embedded.labels):
            return None
        if images.names is not None and names is not None and not np.array_equal(images.names, names):
            return None
    return datasets._replace(bank=_with_label(datasets.bank), test=_with_label(datasets.test))


def _with_label(dataset: ImageDataset) -> ImageDataset:
    kept = np.flatnonzero(dataset.labels >= 0)
    return dataset.take(kept) if len(kept) < len(dataset.labels) else dataset


def _with_labels(embeddings: Embeddings | None) -> Embeddings | None:
    if embeddings is None:
        return None
    kept = Embeddings(labelled(embeddings.bank), labelled(embeddings.test))
    return kept if len(kept.bank.labels) and len(kept.test.labels) else None


def _class_names(*sources: Sequence[ImageDataset | LabelledEmbeddings]) -> list[str]:
    """The class names; characters of folder names that are not valid in UTF-8 are replaced."""
    names = max((split.class_names for splits in sources for split in splits), key=len, default=())
    return [name.encode(errors="replace").decode() for name in names]


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
