"""Online probe: effective rank and kNN on a small fixed set of images during training.

Training does not depend on it: embedding and kNN are separate compiled programs. It measures accuracy on test images,
and nothing is selected by it. The effective rank is that of training images and needs no labels. Projections are not
measured: the coding rate of each step is already a measure of how they spread.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from empssl_jax.config import Config, EvaluationConfig
from empssl_jax.config.errors import DivergenceError
from empssl_jax.data.datasets import Datasets, ImageDataset, first_of_each_class, spread
from empssl_jax.evaluation.effective_rank import effective_rank
from empssl_jax.evaluation.embeddings import Embeddings, LabelledEmbeddings, batch_size_of, embed_images, make_embed
from empssl_jax.evaluation.evaluate import measure_knn
from empssl_jax.method.encoder import EncoderState
from empssl_jax.run_folder.metrics import MetricsWriter
from empssl_jax.run_folder.results import Accuracy

BANK_SIZE, TEST_SIZE = 1000, 500  # images, divided equally among the classes
PATCHES = 16  # averaged into an embedding

ProbeStep = Callable[[int, EncoderState, MetricsWriter], None]


def online_probe(config: Config, datasets: Datasets, last_step: int, mesh: Mesh) -> ProbeStep:
    """Returns the function that the training loop calls after each step, with the steps done, encoder and writer.

    Every `probe_every` steps and after the last one, it measures and writes the effective rank, kNN's accuracy and the
    seconds of training, which exclude the probe's own.

    Args:
        config: the run's config; without `probe_every`, nothing is measured.
        datasets: the first labelled images of each class in `bank` and `test` are used, and evenly spread images of a
            `bank` without labels. Without labels in both, only the effective rank is measured.
        last_step: number of steps in the whole run.
        mesh: the devices.
    """
    every = config.run.probe_every
    if every is None:
        return lambda steps_done, encoder, writer: None
    bank, test = _first_images(datasets.bank, BANK_SIZE), _first_images(datasets.test, TEST_SIZE)
    have_labels = all((split.labels >= 0).any() for split in (bank, test))
    options = _probe_options(config.evaluation, len(bank.labels))
    embed = make_embed(dataclasses.replace(config, evaluation=options), mesh)

    def embeddings(encoder: EncoderState, images: ImageDataset) -> LabelledEmbeddings:
        indices = np.arange(len(images.labels), dtype=np.int32)
        batch_size = batch_size_of(options, mesh)
        embedded = embed_images(embed, encoder, images.images.__getitem__, indices, batch_size, mesh)
        return LabelledEmbeddings(embedded, images.labels, images.class_names)

    def measure(encoder: EncoderState) -> Accuracy:
        of_bank = embeddings(encoder, bank)
        rank = {"effective_rank": effective_rank(of_bank.embeddings)}
        if not have_labels:
            return rank
        return measure_knn(Embeddings(of_bank, embeddings(encoder, test)), options, mesh) | rank

    def probe(steps_done: int, encoder: EncoderState, writer: MetricsWriter) -> None:
        if steps_done % every and steps_done != last_step:
            return
        jax.block_until_ready(encoder)  # steps that are still running count as training time
        with writer.paused():
            try:
                measured = measure(encoder)
            except DivergenceError:  # reported by training, unless embeddings alone are not finite
                measured = {"effective_rank": math.nan}
        writer.add_probe(steps_done, measured)

    return probe


def _probe_options(evaluation: EvaluationConfig, bank_size: int) -> EvaluationConfig:
    """The run's options of evaluation, made cheaper."""
    return dataclasses.replace(
        evaluation,
        valid_patches=PATCHES if evaluation.has_patches else 1,
        cells=1,
        whiten=False,  # so few images give a poor estimate of the covariance
        num_neighbours=min(evaluation.num_neighbours, bank_size),
        label_fraction=1.0,
    )


def _first_images(dataset: ImageDataset, size: int) -> ImageDataset:
    """The first labelled images of each class: up to `size` in total, but at least one of each class.

    If no image has a label, up to `size` evenly spread images.
    """
    labelled = np.flatnonzero(dataset.labels >= 0)
    if len(labelled) == 0:
        return dataset.take(np.array(spread(len(dataset.labels), size)))
    labels = dataset.labels[labelled]
    kept = labelled[first_of_each_class(labels, None, max(1, size // len(np.unique(labels))))]
    return dataset.take(kept)
