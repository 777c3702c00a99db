"""A linear classifier on frozen embeddings, trained by SGD: the whole training is one compiled scan."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from empssl_jax.config import EvaluationConfig
from empssl_jax.evaluation.embeddings import LabelledEmbeddings
from empssl_jax.runtime.devices import DATA_AXIS, replicated, to_devices

MOMENTUM = 0.9


class _Examples(NamedTuple):
    embeddings: Float[Array, "N E"]
    labels: Int[Array, " N"]


class LinearAccuracy(NamedTuple):
    """Accuracy on the test embeddings after each epoch, as fractions; NaN where the classifier is not finite."""

    top1: Float[np.ndarray, " epochs"]
    top5: Float[np.ndarray, " epochs"]


def linear_accuracy(
    key: Key[Array, ""], train: LabelledEmbeddings, test: LabelledEmbeddings, config: EvaluationConfig, mesh: Mesh
) -> LinearAccuracy:
    """Trains a linear classifier and measures it after each epoch.

    SGD with momentum 0.9 and L2 penalty on mini-batches of cross entropy, the learning rate a half cosine by epoch, as
    the references do. The last epoch's accuracy is the classifier's; choosing another looks at the test labels.

    Each device holds and multiplies its share of every embedding's *dimensions*, and of the kernel. What the devices
    exchange in a step is then a batch's logits, B x C numbers; sharing out the images instead would move their
    embeddings in each step, since every batch draws from all, and the whole kernel's gradient.

    Args:
        key: draws the initial weights and the order of the batches.
        train: what is learned from.
        test: what is measured on.
        config: its `linear_*` fields.
        mesh: the devices.
    """
    dim = train.embeddings.shape[1]
    # The devices' shares are equal: zeros fill the last one, which neither logits nor gradients see.
    filling = ((0, 0), (0, -dim % mesh.size))
    examples = [
        _Examples(
            to_devices(np.pad(split.embeddings, filling), _split_dimensions(mesh)),
            to_devices(split.labels, replicated(mesh)),
        )
        for split in (train, test)
    ]
    hits = _run(key, *examples, dim, train.num_classes, config, mesh)
    return LinearAccuracy(*(np.asarray(number, np.float64) / len(test.labels) for number in hits))


def _split_dimensions(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(None, DATA_AXIS))


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _run(key, train, test, dim, num_classes, config, mesh):
    size, padded_dim = train.embeddings.shape
    batch_size = min(config.linear_batch_size, size)
    steps = -(-size // batch_size)

    def learning_rate(step):
        return config.linear_learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * (step // steps) / config.linear_epochs))

    optimizer = optax.chain(
        optax.add_decayed_weights(config.linear_weight_decay), optax.sgd(learning_rate, momentum=MOMENTUM)
    )
    params = init(jax.random.fold_in(key, 0), dim, num_classes)
    kernel = jnp.pad(params["kernel"], ((0, 0), (0, padded_dim - dim)))
    params["kernel"] = jax.lax.with_sharding_constraint(kernel, _split_dimensions(mesh))

    def loss_fn(params, batch, weights):
        losses = optax.softmax_cross_entropy_with_integer_labels(_logits(params, batch.embeddings), batch.labels)
        return jnp.sum(losses * weights) / jnp.sum(weights)

    def step(carry, indices):
        params, state = carry
        # The last batch is filled up with index -1, at weight 0.
        batch = jax.tree.map(lambda x: x[indices], train)
        gradients = jax.grad(loss_fn)(params, batch, (indices >= 0).astype(jnp.float32))
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry, number):
        order = jax.random.permutation(jax.random.fold_in(key, number + 1), size)
        batches = jnp.pad(order, (0, steps * batch_size - size), constant_values=-1).reshape(steps, batch_size)
        carry, _ = jax.lax.scan(step, carry, batches)
        return carry, _hits(_logits(carry[0], test.embeddings), test.labels)

    _, hits = jax.lax.scan(epoch, (params, optimizer.init(params)), jnp.arange(config.linear_epochs))
    return jax.lax.with_sharding_constraint(hits, replicated(mesh))


def init(key, dim, num_classes):
    """As torch's nn.Linear: everything uniform within 1 / sqrt(dim)."""
    kernel_key, bias_key = jax.random.split(key)
    bound = dim**-0.5
    # A row for each class, as torch has it: on CPU its gradient takes a fifth of the time that columns take.
    kernel = jax.random.uniform(kernel_key, (num_classes, dim), minval=-bound, maxval=bound)
    return {"kernel": kernel, "bias": jax.random.uniform(bias_key, (num_classes,), minval=-bound, maxval=bound)}


def _logits(params, embeddings):
    return embeddings @ params["kernel"].T + params["bias"][None, :]


def _hits(logits, labels):
    """How many labels are first, and among the first five; NaN where the classifier is not finite."""
    _, classes = jax.lax.top_k(logits, min(5, logits.shape[1]))
    hits = jnp.where(jnp.isfinite(logits).all(), classes == labels[:, None], jnp.nan)
    return jnp.sum(hits[:, 0]), jnp.sum(jnp.max(hits, axis=1))
