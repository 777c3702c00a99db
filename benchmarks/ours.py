"""The work of each row of the table as empssl_jax does it; benchmarks/theirs.py has the same functions."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, PyTree

from benchmarks.sizes import Sizes, Work, random_images, random_labels, random_vectors
from benchmarks.train_step import STEPS_PER_EPOCH, ready_step, work_of
from empssl_jax.config import Config, EvaluationConfig, ModelConfig, PatchConfig, TrainingConfig
from empssl_jax.data.datasets import ImageDataset
from empssl_jax.evaluation import embeddings, knn, linear
from empssl_jax.method import losses, patches
from empssl_jax.method.encoder import EncoderState, encoder_graph, init_encoder, with_known_precision
from empssl_jax.method.hyperparameters import Hyperparameters
from empssl_jax.method.random_keys import classifier_key
from empssl_jax.method.train_step import create_state, make_optimizer
from empssl_jax.runtime.devices import device_mesh

CLASSES = tuple("0123456789")


def _until_done(work: Callable[[], Any]) -> Work:
    return lambda: jax.block_until_ready(work())


def make_config(sizes: Sizes, patch_size: int) -> Config:
    """The full model at the benchmark's sizes, in the device's default precision."""
    return Config(
        patches=PatchConfig(train_patches=sizes.patches, patch_size=patch_size),
        model=with_known_precision(ModelConfig()),
        training=TrainingConfig(batch_size=sizes.images),
        evaluation=EvaluationConfig(valid_patches=sizes.embedded_patches, linear_epochs=sizes.linear_epochs),
    )


def augmentation(sizes: Sizes) -> Work:
    """Augmented patches of images on the device."""
    images = jnp.asarray(random_images(sizes.augmented_images))
    make = functools.partial(patches.multi_patch, num_patches=sizes.patches, patch_size=sizes.patch_size)
    compiled = jax.jit(make)
    return _until_done(lambda: compiled(jax.random.key(0), images))


def loss_and_gradient(sizes: Sizes, num_images: int) -> Work:
    """Loss and gradient of ready projections of dimension 1024."""
    projections = losses.normalise(jnp.asarray(random_vectors(sizes.patches, num_images, 1024)))
    gradient = jax.jit(jax.value_and_grad(lambda z: losses.emp_ssl_loss(z, 200.0, 0.2).total))
    return _until_done(lambda: gradient(projections))


def lars_update(sizes: Sizes) -> Work:
    """The optimizer's update of the full model, from gradients to new parameters."""
    config = make_config(sizes, sizes.patch_size)
    hyperparameters = Hyperparameters.of(config.training, STEPS_PER_EPOCH)
    optimizer, state = make_optimizer(hyperparameters), create_state(config.model, hyperparameters, device_mesh(1))

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def update(
        gradients: PyTree[Array], params: PyTree[Array], optimizer_state: optax.OptState
    ) -> tuple[PyTree[Array], optax.OptState]:
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return jax.tree.map(jnp.add, params, updates), optimizer_state

    gradients = jax.tree.map(lambda x: x * 1e-3, state.encoder.params)
    current = [state.encoder.params, state.optimizer]

    def work() -> list[Any]:
        current[:] = update(gradients, *current)
        return current

    return _until_done(work)


def forward(sizes: Sizes) -> Work:
    """Embeddings and projections of ready patches, with BatchNorm's running statistics."""
    config = make_config(sizes, sizes.patch_size)
    graph = encoder_graph(config.model)
    state = init_encoder(config.model, jax.random.key(0))
    x = jnp.asarray(random_vectors(sizes.images * sizes.patches, sizes.patch_size, sizes.patch_size, 3))

    @jax.jit
    def run(state: EncoderState, x: Array) -> tuple[Array, Array]:
        encoder = nnx.merge(graph, *state)
        encoder.eval()
        return encoder(x)

    return _until_done(lambda: run(state, x))


def train_step(sizes: Sizes, patch_size: int) -> Work:
    """A train step from images on the device to new parameters, patches included."""
    return work_of(*ready_step(make_config(sizes, patch_size)))


def embedding(sizes: Sizes, batch_size: int = 250) -> Work:
    """Bag-of-features embeddings of images in host memory, `batch_size` images at a time."""
    config = make_config(sizes, sizes.patch_size)
    mesh = device_mesh(1)
    embed = embeddings.make_embed(config, mesh)
    state = init_encoder(config.model, jax.random.key(0))
    dataset = ImageDataset(random_images(sizes.embedded_images), random_labels(sizes.embedded_images), CLASSES)
    return lambda: embeddings.embed_dataset(embed, state, dataset, batch_size, mesh, "images")


def knn_scores(sizes: Sizes) -> Work:
    """Weighted votes of 20 neighbours."""
    queries, bank = (jnp.asarray(random_vectors(n, sizes.dim, seed=n)) for n in (sizes.queries, sizes.bank))
    labels = jnp.asarray(random_labels(sizes.bank))
    scores = functools.partial(knn.knn_scores, num_classes=10, num_neighbours=20, temperature=0.07)
    return _until_done(lambda: scores(queries, bank, labels))


faiss_search = knn_scores  # theirs uses faiss


def linear_probe(sizes: Sizes) -> Work:
    """Training and testing a linear classifier on the same embeddings."""
    vectors, labels = random_vectors(sizes.linear_images, sizes.dim), random_labels(sizes.linear_images)
    split = embeddings.LabelledEmbeddings(vectors, labels.astype(np.int32), CLASSES)
    config = EvaluationConfig(linear_epochs=sizes.linear_epochs)
    return _until_done(lambda: linear.linear_accuracy(classifier_key(0), split, split, config, device_mesh(1)))
