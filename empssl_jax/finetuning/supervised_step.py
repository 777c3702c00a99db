"""The supervised train step: an encoder and a linear classifier learn from labelled crops."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree, UInt8

from empssl_jax.config import ModelConfig
from empssl_jax.evaluation.logistic import Classifier
from empssl_jax.method.encoder import EncoderState, encoder_graph, encoder_state
from empssl_jax.method.patches import multi_patch
from empssl_jax.method.random_keys import finetuning_crops_key
from empssl_jax.runtime.devices import replicated, split_images

Params = dict[str, Any]  # "encoder", and "classifier", which is a `logistic.Classifier`
LAYER, CELLS = "stages", 2  # the embedding that is classified: means of all stages, of each quarter of the image


class Numbers(NamedTuple):
    """The options that are arguments of the compiled step, so that other numbers compile nothing."""

    seed: Int[Array, ""]
    steps_per_epoch: Int[Array, ""]
    last_step: Int[Array, ""]
    learning_rate: Float[Array, ""]
    classifier_learning_rate: Float[Array, ""]
    weight_decay: Float[Array, ""]


class SupervisedState(NamedTuple):
    """Everything that fine-tuning changes."""

    step: Int[Array, ""]  # number of updates made so far
    params: Params
    batch_stats: PyTree[Float[Array, "..."]]
    optimizer: optax.OptState

    @property
    def encoder(self) -> EncoderState:
        """The arrays of the encoder."""
        return EncoderState(self.params["encoder"], self.batch_stats)


Step = Callable[[Numbers, SupervisedState, Any, Any, Any], tuple[SupervisedState, Float[Array, ""]]]


def make_optimizer(numbers: Numbers) -> optax.GradientTransformation:
    """AdamW with a learning rate for the ResNet and one for the classifier; the heads of pretraining do not change."""

    def adamw(peak: Float[Array, ""]) -> optax.GradientTransformation:
        def rate(step: Int[Array, ""]) -> Float[Array, ""]:
            return peak * 0.5 * (1 + jnp.cos(jnp.pi * step / numbers.last_step))

        return optax.adamw(rate, weight_decay=numbers.weight_decay, mask=_are_kernels)

    parts = {
        "encoder": adamw(numbers.learning_rate),
        "classifier": adamw(numbers.classifier_learning_rate),
        "unused": optax.set_to_zero(),
    }
    return optax.partition(parts, _parts)


def _are_kernels(params: PyTree) -> PyTree:
    return jax.tree.map(lambda array: array.ndim > 1, params)


def _parts(params: Params) -> PyTree:
    """The part of the optimizer that each parameter belongs to."""
    encoder = {name: "encoder" if name == "backbone" else "unused" for name in params["encoder"]}
    classifier = Classifier._make(("unused", "unused", "classifier", "classifier"))  # mean, scale, kernel, bias
    return {"encoder": encoder, "classifier": classifier}


def initial_state(encoder: EncoderState, classifier: Classifier, numbers: Numbers) -> SupervisedState:
    """The state before the first step: a trained encoder, and a classifier of its embeddings."""
    params = {"encoder": encoder.params, "classifier": jax.tree.map(jnp.asarray, classifier)}
    return SupervisedState(jnp.zeros([], jnp.int32), params, encoder.batch_stats, make_optimizer(numbers).init(params))


@functools.cache
def make_step(model: ModelConfig, mesh: Mesh, batch_size: int, **crops: Any) -> Step:
    """The compiled step (numbers, state, images, indices, labels) -> (state, loss).

    The loss is the mean cross-entropy of one crop of each image. BatchNorm uses the statistics of the whole batch, so
    the result does not depend on the number of devices, up to rounding.

    Args:
        model: the encoder.
        mesh: the devices. Each has its share of a batch, or all of it if the batch cannot be divided equally.
        batch_size: B, images in a step.
        crops: how crops are made, as keyword arguments of `patches.multi_patch`.
    """
    graph = encoder_graph(model)

    def loss_fn(
        params: Params, batch_stats: PyTree, patches: Float[Array, "B h w 3"], labels: Int[Array, " B"]
    ) -> tuple[Float[Array, ""], PyTree]:
        encoder = nnx.merge(graph, params["encoder"], batch_stats)
        encoder.train()
        embeddings = encoder.embed_cells(patches, LAYER, CELLS).astype(jnp.float32).reshape(len(patches), -1)
        scores = params["classifier"].logits(embeddings)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
        return jnp.mean(losses), encoder_state(encoder).batch_stats

    def step(
        numbers: Numbers,
        state: SupervisedState,
        images: UInt8[Array, "B H W 3"],
        indices: Int[Array, " B"],
        labels: Int[Array, " B"],
    ) -> tuple[SupervisedState, Float[Array, ""]]:
        key = finetuning_crops_key(numbers.seed, state.step // numbers.steps_per_epoch)
        patches = multi_patch(key, images, 1, indices=indices, **crops)[:, 0]
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, batch_stats), gradients = value_and_grad(state.params, state.batch_stats, patches, labels)
        updates, optimizer = make_optimizer(numbers).update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return SupervisedState(state.step + 1, params, batch_stats, optimizer), loss

    copied = replicated(mesh)
    batch = split_images(mesh) if batch_size % mesh.size == 0 else copied
    return jax.jit(step, in_shardings=(copied, copied, batch, batch, batch), out_shardings=copied)
