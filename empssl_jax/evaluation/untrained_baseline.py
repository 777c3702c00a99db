"""What kNN finds in the embeddings of a network that has learned nothing: what a trained one is to be compared with."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from empssl_jax.config import Config
from empssl_jax.data.batches import count_steps, device_batches
from empssl_jax.data.datasets import Datasets
from empssl_jax.evaluation.embeddings import embed_datasets
from empssl_jax.evaluation.evaluate import have_labels, measure_knn
from empssl_jax.method import batch_norm
from empssl_jax.method.encoder import EncoderState
from empssl_jax.method.train_step import create_state, make_train_step
from empssl_jax.run_folder.results import add_results, load_results, of_embeddings
from empssl_jax.runtime.devices import replicated

STATISTICS_PASSES = 10  # steps that set BatchNorm's statistics


def measure_untrained(config: Config, datasets: Datasets, mesh: Mesh, workdir: Path) -> None:
    """Measures kNN with the initial parameters, for comparison, and writes it into results.json.

    No handicap: BatchNorm gets the statistics of real batches of training patches, from steps whose optimizer changes
    nothing. They start at mean 0 and variance 1 and keep a share of themselves in each pass; the share of that start is
    taken out again.
    """
    name = "kNN before training"
    if name in load_results(workdir):
        return
    dataset = datasets.train
    steps_per_epoch = count_steps(dataset, config.training.batch_size)
    nothing = optax.set_to_zero()
    step = make_train_step(config, nothing, optax.constant_schedule(0.0), steps_per_epoch, mesh)
    state = jax.jit(functools.partial(create_state, config, nothing), out_shardings=replicated(mesh))()
    start = jax.tree.map(jnp.copy, state.encoder.batch_stats)
    for batch in device_batches(dataset, config.training, 0, STATISTICS_PASSES, mesh):
        state, _ = step(state, batch)
    kept = batch_norm.MOMENTUM**STATISTICS_PASSES
    batch_stats = jax.tree.map(lambda now, first: (now - kept * first) / (1 - kept), state.encoder.batch_stats, start)
    embeddings = embed_datasets(config, EncoderState(state.encoder.params, batch_stats), datasets, mesh)
    if have_labels(embeddings):
        knn = {name: measure_knn(embeddings, config.evaluation, mesh)}
        add_results(workdir, of_embeddings(config.evaluation.embeddings, knn))
