"""Writes the folder of a run without training: digits, a hundred good steps, and embeddings that separate classes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from empssl_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, PatchConfig, TrainingConfig
from empssl_jax.data.datasets import Datasets, load_split
from empssl_jax.evaluation.embedding_files import save_embeddings
from empssl_jax.evaluation.embeddings import Embeddings, LabelledEmbeddings
from empssl_jax.run_folder import saved_config

STEPS, SECONDS_A_STEP = 100, 2.0
CONFIG = Config(
    data=DataConfig(dataset="digits", images_per_class=20, test_images_per_class=12),
    patches=PatchConfig(train_patches=4, patch_size=16),
    model=ModelConfig(width=4, hidden_dim=24, projection_dim=16, precision="float32"),
    training=TrainingConfig(batch_size=40, max_epochs=20),
    evaluation=EvaluationConfig(valid_patches=2, num_neighbours=5),
)


def datasets(config: Config = CONFIG) -> Datasets:
    """The images of the run."""
    train, test = (load_split(config.data, split, None) for split in ("train", "test"))
    return Datasets(train, train, test)


def metrics_of(step: int) -> dict[str, float]:
    """Metrics that improve until step 50 and then stay constant."""
    share = min(1.0, step / 50)
    rate, similarity = 0.4 + 0.2 * share, 0.6 + 0.3 * share
    return {
        "loss": -20 * rate - 200 * similarity + 0.01 * (-1) ** step,
        "coding_rate": 20 * rate,
        "similarity": similarity,
        "learning_rate": 0.3 * (1 - step / STEPS),
        "coding_rate_fraction": rate,
    }


def embeddings_of(labels: np.ndarray, seed: int) -> np.ndarray:
    """One direction for each class, plus noise."""
    random = np.random.RandomState(seed)
    return np.float32(np.eye(10, 24)[labels] + 0.35 * random.standard_normal((len(labels), 24)))


def write_run(
    folder: Path, config: Config = CONFIG, embed: Callable[[np.ndarray, int], np.ndarray] = embeddings_of
) -> Embeddings:
    """Writes the folder and returns the embeddings; `embed` makes them from labels and a seed."""
    folder.mkdir(parents=True)
    saved_config.save_config(folder, config)
    steps = range(STEPS)
    write_lines(folder / "metrics.jsonl", [{"step": step, **metrics_of(step)} for step in steps])
    times = [{"step": step, "seconds": SECONDS_A_STEP * (step + 1), "devices": "3 x Abacus"} for step in steps]
    write_lines(folder / "timing.jsonl", times)
    images = datasets()
    embeddings = Embeddings(
        *(
            LabelledEmbeddings(embed(split.labels, seed), split.labels, split.class_names)
            for seed, split in enumerate((images.bank, images.test))
        )
    )
    save_embeddings(folder / "embeddings" / "train.npz", embeddings.bank)
    save_embeddings(folder / "embeddings" / "test.npz", embeddings.test)
    return embeddings


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Writes one JSON object per line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def knn_by_numpy(
    queries: np.ndarray, bank: np.ndarray, labels: np.ndarray, neighbours: int, temperature: float, classes: int = 10
) -> np.ndarray:
    """Classes predicted by weighted kNN, one query at a time in float64."""
    unit = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in map(np.float64, (queries, bank))]
    predicted = []
    for query in unit[0]:
        similarities = unit[1] @ query
        votes = np.zeros(classes)
        for i in np.argsort(-similarities)[:neighbours]:
            votes[labels[i]] += np.exp(similarities[i] / temperature)
        predicted.append(int(np.argmax(votes)))
    return np.array(predicted)
