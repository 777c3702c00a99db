"""What the experiments share: results as JSON lines, and embeddings of a run's checkpoints and their accuracies."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from empssl_jax.config import EvaluationConfig
from empssl_jax.config.command_options import CheckpointChoice
from empssl_jax.data.datasets import Datasets
from empssl_jax.evaluation.embeddings import Embeddings, embed_datasets
from empssl_jax.evaluation.evaluate import measure_knn, measure_linear, measure_logistic
from empssl_jax.evaluation.trained_encoder import restore_encoder
from empssl_jax.runtime.devices import device_mesh

RESULTS = Path(__file__).parent / "results"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object per line; empty if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Appends a JSON object to such a file."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def accuracies(embeddings: Embeddings, evaluation: EvaluationConfig, seed: int) -> dict[str, float]:
    """Top-1 accuracies in percent: of kNN and, if the options ask for them, of both classifiers."""
    mesh = device_mesh()
    measured = {"kNN": measure_knn(embeddings, evaluation, mesh)}
    if evaluation.linear_epochs > 0:
        measured["linear"] = measure_linear(embeddings, evaluation, seed, mesh)["linear"]
    if evaluation.logistic:
        measured["logistic"] = measure_logistic(embeddings, evaluation, mesh)
    return {name: 100 * accuracy["top1"] for name, accuracy in measured.items()}


def checkpoint_embeddings(
    workdir: Path, options: EvaluationConfig, datasets: Datasets, step: CheckpointChoice = "latest"
) -> Embeddings:
    """Embeddings of a run's checkpoint, computed with the given options."""
    encoder = restore_encoder(workdir, step)
    config = dataclasses.replace(encoder.config, evaluation=options)
    return embed_datasets(config, encoder.state, datasets, device_mesh())
