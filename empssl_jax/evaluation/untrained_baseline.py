"""The baseline that a trained encoder is compared with: kNN on the embeddings of an untrained one."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from empssl_jax.config import Config
from empssl_jax.data.batches import count_steps, device_batches
from empssl_jax.data.datasets import Datasets
from empssl_jax.evaluation.embeddings import embed_datasets
from empssl_jax.evaluation.evaluate import have_labels, how_knn_is_measured, knn_results
from empssl_jax.method import batch_norm
from empssl_jax.method.encoder import EncoderState
from empssl_jax.method.hyperparameters import Hyperparameters
from empssl_jax.method.train_step import create_state, make_train_step
from empssl_jax.run_folder.results import add_results, load_results, measure_name
from empssl_jax.runtime.devices import replicated, to_devices

STATISTICS_PASSES = 10  # steps that set BatchNorm's statistics


def measure_untrained(config: Config, datasets: Datasets, mesh: Mesh, workdir: Path) -> None:
    """Measures kNN with the initial parameters and writes it into results.json, unless the same result is there.

    Images without labels allow no kNN, which is printed.

    For a fair comparison, BatchNorm's running statistics are first computed from real batches of training patches, in
    a few training steps at a learning rate of 0. They are moving averages that start at mean 0 and variance 1; the
    remaining weight of this start is removed afterwards.
    """
    name = "kNN before training"
    known = load_results(workdir).get(measure_name(name, config.evaluation), {})
    if known.items() >= how_knn_is_measured(config.evaluation).items():
        return
    if not have_labels(datasets):
        return
    dataset = datasets.train
    steps_per_epoch = count_steps(dataset, config.training.batch_size)
    zero: Any = np.zeros([], np.float32)
    still = Hyperparameters.of(config.training, steps_per_epoch)._replace(learning_rate=zero, warmup_rise=zero)
    still = to_devices(still, replicated(mesh))
    step, state = make_train_step(config, mesh), create_state(config.model, still, mesh)
    start = jax.tree.map(jnp.copy, state.encoder.batch_stats)  # a copy, because the train step donates the state
    for batch in device_batches(dataset, config.training, 0, STATISTICS_PASSES, mesh):
        # One at a time, as in training: on CPU, XLA aborts if the devices of many steps wait for each other too long.
        state, _ = jax.block_until_ready(step(still, state, batch))
    weight = batch_norm.MOMENTUM**STATISTICS_PASSES  # of the start, after all steps
    batch_stats = jax.tree.map(
        lambda now, first: (now - weight * first) / (1 - weight), state.encoder.batch_stats, start
    )
    embeddings = embed_datasets(config, EncoderState(state.encoder.params, batch_stats), datasets, mesh)
    add_results(workdir, knn_results(name, embeddings, config.evaluation, mesh))
