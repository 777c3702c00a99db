"""Measures a trained encoder: computes embeddings, their effective rank and accuracies, and writes results.json."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from empssl_jax.config import Config, EmbeddingConfig, EvaluationConfig
from empssl_jax.config.command_options import EvaluateOptions, MeasuredData
from empssl_jax.config.errors import DivergenceError, require
from empssl_jax.data.datasets import SPLITS, Datasets, load_datasets, load_datasets_for_pictures
from empssl_jax.evaluation.accuracy import print_unknown_classes, top_k_accuracy
from empssl_jax.evaluation.effective_rank import spectrum
from empssl_jax.evaluation.embedding_files import files_digest, load_both_embeddings
from empssl_jax.evaluation.embeddings import Embeddings, labelled, needs_mirrored
from empssl_jax.evaluation.few_labels import chosen_embeddings, chosen_rows
from empssl_jax.evaluation.knn import check_num_neighbours, sharded_knn_scores
from empssl_jax.evaluation.linear import linear_accuracy
from empssl_jax.evaluation.logistic import logistic_accuracy
from empssl_jax.evaluation.measured_images import measured_images
from empssl_jax.evaluation.run_embeddings import run_embeddings
from empssl_jax.evaluation.trained_encoder import restore_encoder
from empssl_jax.evaluation.whitening import whitened
from empssl_jax.method.random_keys import classifier_key
from empssl_jax.run_folder.results import (
    EFFECTIVE_RANK,
    Accuracy,
    add_results,
    drop_results,
    format_table,
    load_results,
    of_labels,
    on_dataset,
    recorded,
)
from empssl_jax.run_folder.saved_config import load_config
from empssl_jax.run_folder.workdir import locked, storage_errors
from empssl_jax.runtime.devices import device_mesh

KNN_OPTIONS = ("num_neighbours", "temperature")
LINEAR_OPTIONS = ("linear_epochs", "linear_learning_rate", "linear_weight_decay", "linear_batch_size")
WriteReport = Callable[[Path, Config, Datasets | None], None]  # the run's folder, config and images, if available


def evaluate(options: EvaluateOptions, write_report: WriteReport) -> dict[str, Accuracy]:
    """Measures a run, or given embeddings. Prints a table and writes results.json into their folder.

    Args:
        options: what to evaluate.
        write_report: called at the end if the options ask for a report.

    Raises:
        UserError: the run or the checkpoint does not exist, is damaged or in use, or the options do not fit it.
    """
    mesh = device_mesh()
    if options.embeddings is not None:
        folder = Path(options.embeddings)
        _check_only_embeddings(options)
        load_results(folder)  # raises an error for a damaged file before the work begins
        embeddings, files = _given_embeddings(folder, options), files_digest(folder)
        drop_results(folder, lambda result: result.get("files") != files, "results of other embeddings")
        return _measure(folder, embeddings, Config(evaluation=options.evaluation), mesh, files=files)
    folder = Path(options.workdir)
    trained = load_config(folder)
    options.evaluation.require_patches()
    untrained, remedy = options.evaluation.untrained, "only empssl train measures kNN before training, so leave it out"
    require(untrained == trained.evaluation.untrained, "untrained", untrained, remedy)
    run = dataclasses.replace(trained.run, data_dir=options.data_dir, cache_dir=options.cache_dir)
    measured = measured_images(options.data, trained.data, folder)
    config = dataclasses.replace(trained, data=measured.data, evaluation=options.evaluation, run=run)
    with locked(folder):
        load_results(folder)  # raises an error for a damaged file before the work begins
        encoder = restore_encoder(folder, options.step)
        there = "" if measured.name is None else f" on {measured.name}"
        print(f"evaluating step {encoder.step} of {folder}{there}: {config.evaluation.embeddings}")
        datasets = load_datasets(config)
        check_neighbours(config, datasets)
        with storage_errors(folder):
            results = _measure(
                folder,
                run_embeddings(config, encoder.state, datasets, mesh, measured.embeddings_folder(folder)),
                config,
                mesh,
                config.evaluation.embeddings,
                measured.name,
                encoder.step,
            )
        if options.evaluation.report:
            own = dataclasses.replace(trained, run=run)  # the report is about the data set of the run
            is_own = measured.name is None
            write_report(folder, config if is_own else own, datasets if is_own else load_datasets_for_pictures(own))
        return results


def _check_only_embeddings(options: EvaluateOptions) -> None:
    """Raises UserError for options of a run, which are meaningless for given embeddings."""
    remedy = "they are measured as they are, so leave out --dataset and its options, or --embeddings"
    require(options.data == MeasuredData(), "embeddings", options.embeddings, remedy)
    own, remedy = EvaluateOptions(), "leave it out, since --embeddings are measured as they are"
    of_embedding = [field.name for field in dataclasses.fields(EmbeddingConfig)]
    groups: list[tuple[Any, Any, list[str]]] = [
        (options, own, ["workdir", "step", "data_dir", "cache_dir"]),
        (options.evaluation, own.evaluation, [*of_embedding, "embedding_batch_size", "untrained"]),
    ]
    for given, default, names in groups:
        for name in names:
            value = getattr(given, name)
            require(value == getattr(default, name), name, value, remedy)


def _given_embeddings(folder: Path, options: EvaluateOptions) -> Embeddings:
    """The embeddings of a folder; raises UserError if they cannot be read or lack those of mirrored images."""
    embeddings = load_both_embeddings(folder, options.evaluation.mirror)
    for split, name in zip(embeddings, SPLITS, strict=True):
        remedy = f"{folder / name}.npz has no array named mirrored, so leave it out"
        require(split.mirrored is not None or not needs_mirrored(options.evaluation, name), "mirror", True, remedy)
    return embeddings


def _measure(
    folder: Path,
    embeddings: Embeddings,
    config: Config,
    mesh: Mesh,
    made: str | None = None,
    dataset: str | None = None,
    step: int | None = None,
    files: str | None = None,
) -> dict[str, Accuracy]:
    """Measures embeddings; writes each result into the folder as soon as it is known, and prints all at the end.

    Args:
        folder: where results.json is.
        embeddings: what is measured.
        config: the options of the measures, and their seed.
        mesh: the devices.
        made: how the embeddings were made, which is saved with the results; None if unknown.
        dataset: the data set, None for the run's own.
        step: the checkpoint, None for embeddings of no run.
        files: digest of the given files, None for embeddings of a run.
    """

    evaluation, results = config.evaluation, dict[str, Accuracy]()

    def add(measured: dict[str, Accuracy], options: Sequence[str] = ()) -> None:
        chosen = None if step is None else {name: getattr(evaluation, name) for name in options}
        how = {"embeddings": made, "step": step, "options": chosen, "files": files}
        results.update(on_dataset(dataset, recorded(measured, **how)))
        with contextlib.suppress(OSError):  # reported at the end, when all has been measured
            add_results(folder, results)

    try:
        add(measure_rank(embeddings))
        if have_labels(embeddings):
            add(of_labels(evaluation, {"kNN": measure_knn(embeddings, evaluation, mesh)}), KNN_OPTIONS)
            if evaluation.linear_epochs > 0:
                accuracies = measure_linear(embeddings, evaluation, config.training.seed, mesh)
                add(of_labels(evaluation, accuracies), LINEAR_OPTIONS)
            if evaluation.logistic:
                add(of_labels(evaluation, {"logistic": measure_logistic(embeddings, evaluation, mesh)}))
    finally:  # what has been measured is shown even if the linear classifier diverges, or the disk is full
        if results:  # an interruption can come before the first one
            try:
                add_results(folder, results)
            finally:
                print(format_table(load_results(folder) | results))
    return results


def check_neighbours(config: Config, datasets: Datasets) -> None:
    """Raises UserError if kNN is measured but has fewer than `num_neighbours` labelled images to learn from."""
    num_labelled = len(chosen_rows(datasets.bank.labels, config.evaluation))
    if config.evaluation.valid_patches > 0 and num_labelled > 0 and (datasets.test.labels >= 0).any():
        check_num_neighbours(config.evaluation.num_neighbours, num_labelled)


def measure_rank(embeddings: Embeddings) -> dict[str, Accuracy]:
    """The effective rank of the test embeddings, which needs no labels, as results.json has it."""
    measured = spectrum(embeddings.test.embeddings)
    rank = {"rank": measured.effective_rank, "images": measured.images, "dimensions": measured.dimensions}
    return {EFFECTIVE_RANK: rank}


def have_labels(images: Embeddings | Datasets) -> bool:
    """Returns whether both splits have labels, which all accuracies need. If not, prints which ones have none.

    Also prints how many test images can only be wrong, because no training image has their class.
    """
    labels = {"train": images.bank.labels, "test": images.test.labels}
    unlabelled = [name for name, split in labels.items() if not (split >= 0).any()]
    if unlabelled:
        print(f"no {' and no '.join(unlabelled)} image has a label: kNN and linear are not measured")
        return False
    test = labels["test"]
    print_unknown_classes(labels["train"], test[test >= 0], images.test.class_names)
    return True


def knn_results(name: str, embeddings: Embeddings, config: EvaluationConfig, mesh: Mesh) -> dict[str, Accuracy]:
    """`measure_knn` of a run's embeddings, as results.json has it under this name."""
    return recorded(of_labels(config, {name: measure_knn(embeddings, config, mesh)}), **how_knn_is_measured(config))


def how_knn_is_measured(config: EvaluationConfig) -> dict[str, Any]:
    """What `knn_results` records."""
    return {"embeddings": config.embeddings, "options": {name: getattr(config, name) for name in KNN_OPTIONS}}


def measure_knn(embeddings: Embeddings, config: EvaluationConfig, mesh: Mesh) -> Accuracy:
    """Accuracy of weighted kNN on the labelled test embeddings."""
    bank, test = knn_embeddings(embeddings, config)
    bank = chosen_embeddings(bank, config).with_mirrored()
    scores = sharded_knn_scores(
        mesh,
        test.embeddings,
        bank.embeddings,
        bank.labels,
        num_classes=bank.num_classes,
        num_neighbours=config.num_neighbours,
        temperature=config.temperature,
    )
    return {f"top{k}": top_k_accuracy(jnp.asarray(scores), jnp.asarray(test.labels), k) for k in (1, 5)}


def knn_embeddings(embeddings: Embeddings, config: EvaluationConfig) -> Embeddings:
    """The embeddings that kNN compares, of all training images and of the labelled test images."""
    bank, test = embeddings.bank.keep_mirrored(config.mirror), labelled(embeddings.test).keep_mirrored(False)
    # Whitening learns from all images, since it uses no label: those with a label could be few, with a poor covariance.
    return Embeddings(*whitened(bank, test)) if config.whiten else Embeddings(bank, test)


def measure_logistic(embeddings: Embeddings, config: EvaluationConfig, mesh: Mesh) -> Accuracy:
    """Accuracy of logistic regression on the labelled test embeddings."""
    return logistic_accuracy(chosen_embeddings(embeddings.bank, config), labelled(embeddings.test), mesh)


def measure_linear(embeddings: Embeddings, config: EvaluationConfig, seed: int, mesh: Mesh) -> dict[str, Accuracy]:
    """Accuracy of the linear classifier on the labelled test embeddings, after its last epoch and after its best.

    The best epoch is the one with the highest top-1 accuracy on the same test embeddings.

    Raises:
        DivergenceError: the classifier's logits are not finite after the last epoch.
    """
    bank, test = chosen_embeddings(embeddings.bank, config).with_mirrored(), labelled(embeddings.test)
    top1, top5 = linear_accuracy(classifier_key(seed), bank, test, config, mesh)
    if not np.isfinite(top1[-1]):
        rate = config.linear_learning_rate
        raise DivergenceError(f"The linear classifier diverged at --linear-learning-rate {rate}: try a lower one.")
    best = int(np.nanargmax(top1))
    return {
        "linear": {"top1": float(top1[-1]), "top5": float(top5[-1])},
        "linear, best epoch on test": {"top1": float(top1[best]), "top5": float(top5[best])},
    }
