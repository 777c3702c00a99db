"""Measures a trained encoder: computes embeddings, runs kNN and a linear classifier on them, writes results.json."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from empssl_jax.config import Config, EvaluationConfig
from empssl_jax.config.command_options import EvaluateOptions
from empssl_jax.config.errors import DivergenceError, require
from empssl_jax.data.datasets import Datasets, load_datasets
from empssl_jax.evaluation.embedding_files import load_both_embeddings, save_embeddings
from empssl_jax.evaluation.embeddings import Embeddings, embed_datasets, labelled
from empssl_jax.evaluation.knn import check_num_neighbours, sharded_knn_scores, top_k_accuracy
from empssl_jax.evaluation.linear import linear_accuracy
from empssl_jax.evaluation.trained_encoder import restore_encoder
from empssl_jax.evaluation.whitening import whitened
from empssl_jax.method.encoder import EncoderState
from empssl_jax.method.random_keys import classifier_key
from empssl_jax.run_folder.results import Accuracy, add_results, format_table, load_results, of_embeddings
from empssl_jax.run_folder.saved_config import load_config
from empssl_jax.run_folder.workdir import locked, storage_errors
from empssl_jax.runtime.devices import device_mesh
from empssl_jax.runtime.distributed import is_first_process

WriteReport = Callable[[Path, Config, Datasets], None]  # the run's folder, config and images


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
        load_results(folder)  # raises an error for a damaged file before the work begins
        return _measure(folder, load_both_embeddings(folder), options.evaluation, Config().training.seed, mesh, None)
    folder = Path(options.workdir)
    config = load_config(folder)
    require(options.evaluation.valid_patches > 0, "valid_patches", 0, "give the number of patches, such as 128")
    run = dataclasses.replace(config.run, data_dir=options.data_dir, cache_dir=options.cache_dir)
    config = dataclasses.replace(config, evaluation=options.evaluation, run=run)
    with locked(folder), storage_errors(folder):
        load_results(folder)  # raises an error for a damaged file before the work begins
        encoder = restore_encoder(folder, options.step)
        print(f"evaluating step {encoder.step} of {folder}: {config.evaluation.embeddings}")
        datasets = load_datasets(config)
        check_neighbours(config, datasets)
        embeddings = embed_and_save(config, encoder.state, datasets, mesh, folder)
        made = config.evaluation.embeddings
        results = _measure(folder, embeddings, config.evaluation, config.training.seed, mesh, made)
        if options.evaluation.report:
            write_report(folder, config, datasets)
        return results


def _measure(
    folder: Path, embeddings: Embeddings, config: EvaluationConfig, seed: int, mesh: Mesh, made: str | None
) -> dict[str, Accuracy]:
    """Measures embeddings; `made` describes how they were made and is saved with the results, None if unknown."""
    if not have_labels(embeddings):
        return {}
    results = of_embeddings(made, {"kNN": measure_knn(embeddings, config, mesh)})
    try:
        if config.linear_epochs > 0:
            results |= of_embeddings(made, measure_linear(embeddings, config, seed, mesh))
    finally:  # kNN is kept even if the linear classifier diverges, and shown even if the disk is full
        try:
            add_results(folder, results)
        finally:
            print(format_table(load_results(folder) | results))
    return results


def check_neighbours(config: Config, datasets: Datasets) -> None:
    """Raises UserError if the bank has labelled images, but fewer than `num_neighbours`."""
    if num_labelled := int(np.count_nonzero(datasets.bank.labels >= 0)):
        check_num_neighbours(config.evaluation.num_neighbours, num_labelled)


def embed_and_save(config: Config, encoder: EncoderState, datasets: Datasets, mesh: Mesh, workdir: Path) -> Embeddings:
    """Embeds the bank and the test images, and writes the run's embeddings/{train,test}.npz."""
    embeddings = embed_datasets(config, encoder, datasets, mesh)
    if is_first_process():
        save_embeddings(workdir / "embeddings" / "train.npz", embeddings.bank)
        save_embeddings(workdir / "embeddings" / "test.npz", embeddings.test)
    return embeddings


def have_labels(embeddings: Embeddings) -> bool:
    """Returns whether both splits have labels, which all measures need. If not, prints which ones have none."""
    splits = {"train": embeddings.bank, "test": embeddings.test}
    unlabelled = [name for name, split in splits.items() if not len(labelled(split).labels)]
    if unlabelled:
        print(f"no {' and no '.join(unlabelled)} image has a label: kNN and linear are not measured")
    return not unlabelled


def measure_knn(embeddings: Embeddings, config: EvaluationConfig, mesh: Mesh) -> Accuracy:
    """Accuracy of weighted kNN on the labelled test embeddings."""
    bank, test = labelled(embeddings.bank), labelled(embeddings.test)
    if config.whiten:
        bank, test = whitened(bank, test)
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


def measure_linear(embeddings: Embeddings, config: EvaluationConfig, seed: int, mesh: Mesh) -> dict[str, Accuracy]:
    """Accuracy of the linear classifier on the labelled test embeddings, after its last epoch and after its best.

    The best epoch is the one with the highest top-1 accuracy on the same test embeddings.

    Raises:
        DivergenceError: the classifier's logits are not finite after the last epoch.
    """
    bank, test = labelled(embeddings.bank), labelled(embeddings.test)
    top1, top5 = linear_accuracy(classifier_key(seed), bank, test, config, mesh)
    if not np.isfinite(top1[-1]):
        rate = config.linear_learning_rate
        raise DivergenceError(f"The linear classifier diverged at --linear-learning-rate {rate}: try a lower one.")
    best = int(np.nanargmax(top1))
    return {
        "linear": {"top1": float(top1[-1]), "top5": float(top5[-1])},
        "linear, best epoch on test": {"top1": float(top1[best]), "top5": float(top5[best])},
    }
