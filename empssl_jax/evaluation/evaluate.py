"""What eval.py runs: embeddings of a trained encoder, kNN and a linear classifier on them, a table and results.json."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from empssl_jax.command_line import first_options, run_defaults
from empssl_jax.config import Config, DistributedConfig, EvaluationConfig, RunConfig
from empssl_jax.config.errors import require
from empssl_jax.data import datasets as data
from empssl_jax.evaluation.embeddings import (
    LabelledEmbeddings,
    embed_dataset,
    labelled,
    load_embeddings,
    make_embed,
    save_embeddings,
)
from empssl_jax.evaluation.knn import check_num_neighbours, sharded_knn_scores, top_k_accuracy
from empssl_jax.evaluation.linear import linear_accuracy
from empssl_jax.evaluation.whitening import whitened
from empssl_jax.inference.image_encoder import load
from empssl_jax.method.encoder import EncoderState
from empssl_jax.method.random_keys import classifier_key
from empssl_jax.report import try_to_report
from empssl_jax.run_folder.checkpoints import Which
from empssl_jax.run_folder.metrics import DivergenceError
from empssl_jax.run_folder.results import Accuracy, add_results, format_table, load_results, of_embeddings
from empssl_jax.run_folder.saved_config import load_config
from empssl_jax.run_folder.workdir import claimed, storage_errors
from empssl_jax.runtime.distributed import is_first_process

_flat = tyro.conf.arg(name="")
Datasets = dict[str, data.ImageDataset]  # "train", "test", and "bank", see `data.load_bank`
Embeddings = dict[data.Split, LabelledEmbeddings]


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate and how."""

    workdir: str = RunConfig.workdir
    """Folder of a run of train.py; several, as runs/*, are measured where that has not been done, and compared."""
    step: Which = "latest"
    """Checkpoint to restore: its step, or the newest, or the one with the lowest loss."""
    embeddings: str | None = None
    """Folder with train.npz and test.npz to evaluate, in place of a checkpoint."""
    data_dir: str | None = None
    """Folder of prepared TFDS data sets; by default the run's, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    cache_dir: str | None = None
    """Folder for decoded images; by default the run's, else empssl_jax/images of the user's cache folder."""
    evaluation: Annotated[EvaluationConfig, _flat] = dataclasses.field(default_factory=EvaluationConfig)
    distributed: Annotated[DistributedConfig, _flat] = dataclasses.field(default_factory=DistributedConfig)


@dataclass(frozen=True)
class _Source:
    workdir: str = EvaluateOptions.workdir
    embeddings: str | None = None


def parse_evaluate_options(arguments: Sequence[str]) -> EvaluateOptions:
    """The options of `eval.py`; what is not given is as the run in --workdir had it."""
    source, _ = first_options(_Source, arguments)
    config = run_defaults(source.workdir, arguments) if source.embeddings is None else Config()
    run = config.run
    default = EvaluateOptions(data_dir=run.data_dir, cache_dir=run.cache_dir, evaluation=config.evaluation)
    description = "Measures the embeddings of a trained encoder by kNN and a linear classifier."
    return tyro.cli(EvaluateOptions, args=list(arguments), default=default, description=description)


def evaluate(options: EvaluateOptions) -> dict[str, Accuracy]:
    """Measures a run, or given embeddings; prints a table and writes results.json beside what was measured.

    Raises:
        UserError: there is no such run or checkpoint, or it is damaged or in use, or the options do not fit it.
    """
    mesh = data.device_mesh()
    if options.embeddings is not None:
        folder = Path(options.embeddings)
        load_results(folder)  # refuses a damaged file now rather than after the work
        return _measure(folder, _load_both_embeddings(folder), options.evaluation, Config().training.seed, mesh, None)
    folder = Path(options.workdir)
    config = load_config(folder)
    require(options.evaluation.valid_patches > 0, "valid_patches", 0, "give the number of patches to embed, as 128")
    run = dataclasses.replace(config.run, data_dir=options.data_dir, cache_dir=options.cache_dir)
    config = dataclasses.replace(config, evaluation=options.evaluation, run=run)
    with claimed(folder), storage_errors(folder):
        load_results(folder)  # refuses a damaged file now rather than after the work
        encoder = load(folder, options.step)
        print(f"evaluating step {encoder.step} of {folder}: {config.evaluation.embeddings}")
        datasets = load_datasets(config)
        embeddings = embed_and_save(config, encoder.state, datasets, mesh, folder)
        made = config.evaluation.embeddings
        results = _measure(folder, embeddings, config.evaluation, config.training.seed, mesh, made)
        if options.evaluation.report:
            try_to_report(folder, config, datasets)
        return results


def _load_both_embeddings(folder: Path) -> Embeddings:
    embeddings = {split: load_embeddings(folder / f"{split}.npz") for split in data.SPLITS}
    dims = [labelled.embeddings.shape[1] for labelled in embeddings.values()]
    require(len(set(dims)) == 1, "embeddings", str(folder), f"its splits have dimensions {dims}, make them equal")
    return embeddings


def _measure(
    folder: Path, embeddings: Embeddings, config: EvaluationConfig, seed: int, mesh: Mesh, made: str | None
) -> dict[str, Accuracy]:
    if not have_labels(embeddings):
        return {}
    results = of_embeddings(made, {"kNN": measure_knn(embeddings, config, mesh)})
    try:
        if config.linear_epochs > 0:
            results |= of_embeddings(made, measure_linear(embeddings, config, seed, mesh))
    finally:  # what was measured is shown and kept also where the linear classifier diverges or the disk is full
        print(format_table(load_results(folder) | results))
        add_results(folder, results)
    return results


def load_datasets(config: Config) -> Datasets:
    """The images of a run; raises UserError if there are fewer labelled ones to look among than kNN asks."""
    folders = config.run.data_dir, config.run.cache_dir
    datasets: Datasets = {split: data.load(config.data, split, *folders) for split in data.SPLITS}
    bank = datasets["bank"] = data.load_bank(config.data, datasets["train"], *folders)
    if num_labelled := int(np.count_nonzero(bank.labels >= 0)):
        check_num_neighbours(config.evaluation.num_neighbours, num_labelled)
    return datasets


def embed_and_save(config: Config, encoder: EncoderState, datasets: Datasets, mesh: Mesh, workdir: Path) -> Embeddings:
    """Embeddings of the bank and the test images, left behind in the run's embeddings/{train,test}.npz."""
    embeddings = embed_splits(config, encoder, datasets, mesh)
    if is_first_process():
        for split, labelled in embeddings.items():
            save_embeddings(workdir / "embeddings" / f"{split}.npz", labelled)
    return embeddings


def embed_splits(config: Config, encoder: EncoderState, datasets: Datasets, mesh: Mesh) -> Embeddings:
    """Embeddings of the bank and of the test images."""
    embed, batch_size = make_embed(config, mesh), config.evaluation.embedding_batch_size
    return {
        split: embed_dataset(embed, encoder, datasets[name], batch_size, mesh, split)
        for split, name in zip(data.SPLITS, ("bank", "test"), strict=True)
    }


def have_labels(embeddings: Embeddings) -> bool:
    """Whether there is anything to measure; if not, says so."""
    unlabelled = [split for split in data.SPLITS if not len(labelled(embeddings[split]).labels)]
    if unlabelled:
        print(f"no {' and no '.join(unlabelled)} image has a label, so that neither kNN nor linear is measured")
    return not unlabelled


def measure_knn(embeddings: Embeddings, config: EvaluationConfig, mesh: Mesh) -> Accuracy:
    """Accuracy of weighted kNN on the labelled test embeddings."""
    train, test = labelled(embeddings["train"]), labelled(embeddings["test"])
    if config.whiten:
        train, test = whitened(train, test)
    scores = sharded_knn_scores(
        mesh,
        test.embeddings,
        train.embeddings,
        train.labels,
        num_classes=train.num_classes,
        num_neighbours=config.num_neighbours,
        temperature=config.temperature,
    )
    return {f"top{k}": top_k_accuracy(jnp.asarray(scores), jnp.asarray(test.labels), k) for k in (1, 5)}


def measure_linear(embeddings: Embeddings, config: EvaluationConfig, seed: int, mesh: Mesh) -> dict[str, Accuracy]:
    """Accuracy of the linear classifier on the labelled test embeddings, after its last epoch and at its best on them.

    Raises:
        DivergenceError: it is not finite any more.
    """
    train, test = labelled(embeddings["train"]), labelled(embeddings["test"])
    top1, top5 = linear_accuracy(classifier_key(seed), train, test, config, mesh)
    if not np.isfinite(top1[-1]):
        rate = config.linear_learning_rate
        raise DivergenceError(f"The linear classifier diverged at --linear-learning-rate {rate}: try a lower one.")
    best = int(np.nanargmax(top1))
    return {
        "linear": {"top1": float(top1[-1]), "top5": float(top5[-1])},
        "linear, best epoch on test": {"top1": float(top1[best]), "top5": float(top5[best])},
    }
