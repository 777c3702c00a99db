"""A linear classifier on frozen embeddings, trained with SGD in a single compiled scan."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from empssl_jax.config import EvaluationConfig
from empssl_jax.evaluation.embeddings import LabelledEmbeddings
from empssl_jax.runtime.devices import DATA_AXIS, padded, replicated, to_devices

MOMENTUM = 0.9

Params = dict[str, Array]  # "kernel" (C, E) and "bias" (C,)
Carry = tuple[Params, optax.OptState]


class _Examples(NamedTuple):
    embeddings: Float[Array, "N E"]
    labels: Int[Array, " N"]


class LinearAccuracy(NamedTuple):
    """Accuracy on the test embeddings after each epoch, as fractions; NaN where a logit is not finite."""

    top1: Float[np.ndarray, " epochs"]
    top5: Float[np.ndarray, " epochs"]


def linear_accuracy(
    key: Key[Array, ""], train: LabelledEmbeddings, test: LabelledEmbeddings, config: EvaluationConfig, mesh: Mesh
) -> LinearAccuracy:
    """Trains a linear classifier and measures it after each epoch.

    As in the references, SGD with momentum 0.9 minimises the cross entropy with an L2 penalty, and the learning rate
    decays along a half cosine, constant within an epoch. The accuracy to report is that of the last epoch; choosing
    another epoch would use the test labels.

    Each device holds a share of the embedding *dimensions*, for all images, and the same share of the kernel. In a
    step, the devices exchange only the batch's logits, B x C numbers. If each held a share of the images instead, they
    would exchange embeddings, since every batch draws from all images, and the gradient of the whole kernel.

    Args:
        key: draws the initial weights and the order of the batches.
        train: embeddings to learn from.
        test: embeddings to measure the accuracy on.
        config: its `linear_*` fields are used.
        mesh: the devices.
    """
    dim = train.embeddings.shape[1]
    examples = [
        _Examples(
            # The padding changes neither logits nor gradients.
            to_devices(padded(split.embeddings, mesh, axis=1), _split_dimensions(mesh)),
            to_devices(split.labels, replicated(mesh)),
        )
        for split in (train, test)
    ]
    rates = (np.float32(config.linear_learning_rate), np.float32(config.linear_weight_decay))
    static = (dim, train.num_classes, config.linear_batch_size, config.linear_epochs, mesh)
    hits = _run(key, *examples, *rates, *static)
    return LinearAccuracy(*(np.asarray(number, np.float64) / len(test.labels) for number in hits))


def _split_dimensions(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(None, DATA_AXIS))


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8, 9))
def _run(
    key: Key[Array, ""],
    train: _Examples,
    test: _Examples,
    peak_rate: Float[Array, ""],
    weight_decay: Float[Array, ""],
    dim: int,
    num_classes: int,
    batch_size: int,
    epochs: int,
    mesh: Mesh,
) -> tuple[Float[Array, " epochs"], Float[Array, " epochs"]]:
    """Number of correct test predictions after each epoch, top-1 and top-5."""
    size, padded_dim = train.embeddings.shape
    batch_size = min(batch_size, size)
    steps = -(-size // batch_size)

    def learning_rate(step: Int[Array, ""]) -> Float[Array, ""]:
        return peak_rate * 0.5 * (1 + jnp.cos(jnp.pi * (step // steps) / epochs))

    optimizer = optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum=MOMENTUM))
    has_images = jnp.zeros(num_classes, bool).at[train.labels].set(True)
    params = init(jax.random.fold_in(key, 0), dim, num_classes)
    params["kernel"] = _pad_dimensions(params["kernel"], padded_dim - dim, mesh)

    def loss_fn(params: Params, batch: _Examples, weights: Float[Array, " B"]) -> Float[Array, ""]:
        losses = optax.softmax_cross_entropy_with_integer_labels(_logits(params, batch.embeddings), batch.labels)
        return jnp.sum(losses * weights) / jnp.sum(weights)

    def step(carry: Carry, indices: Int[Array, " B"]) -> tuple[Carry, None]:
        params, state = carry
        # The last batch is padded with index -1, which gets weight 0.
        batch = jax.tree.map(lambda x: x[indices], train)
        gradients = jax.grad(loss_fn)(params, batch, (indices >= 0).astype(jnp.float32))
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry: Carry, number: Int[Array, ""]) -> tuple[Carry, tuple[Array, Array]]:
        order = jax.random.permutation(jax.random.fold_in(key, number + 1), size)
        batches = jnp.pad(order, (0, steps * batch_size - size), constant_values=-1).reshape(steps, batch_size)
        carry, _ = jax.lax.scan(step, carry, batches)
        return carry, _hits(_logits(carry[0], test.embeddings), test.labels, has_images)

    _, hits = jax.lax.scan(epoch, (params, optimizer.init(params)), jnp.arange(epochs))
    return jax.lax.with_sharding_constraint(hits, replicated(mesh))


def init(key: Key[Array, ""], dim: int, num_classes: int) -> Params:
    """Initial parameters as in torch's nn.Linear: uniform between -1 / sqrt(dim) and 1 / sqrt(dim)."""
    kernel_key, bias_key = jax.random.split(key)
    bound = dim**-0.5
    # One row per class, as in torch: on CPU, its gradient takes a fifth of the time that one column per class takes.
    kernel = jax.random.uniform(kernel_key, (num_classes, dim), minval=-bound, maxval=bound)
    return {"kernel": kernel, "bias": jax.random.uniform(bias_key, (num_classes,), minval=-bound, maxval=bound)}


def _pad_dimensions(kernel: Float[Array, "C E"], missing: int, mesh: Mesh) -> Float[Array, "C F"]:
    """The kernel, padded with zeros to shares of equal size, and split over the devices."""
    return jax.lax.with_sharding_constraint(jnp.pad(kernel, ((0, 0), (0, missing))), _split_dimensions(mesh))


def _logits(params: Params, embeddings: Float[Array, "N E"]) -> Float[Array, "N C"]:
    # As PyTorch multiplies: in float32 on every device.
    return jnp.matmul(embeddings, params["kernel"].T, precision=jax.lax.Precision.HIGHEST) + params["bias"][None, :]


def _hits(
    logits: Float[Array, "N C"], labels: Int[Array, " N"], has_images: Bool[Array, " C"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Number of labels with the highest logit, and with one of the five highest; NaN if a logit is not finite.

    A class without training images is not predicted: no image has taught the classifier what it looks like.
    """
    highest, classes = jax.lax.top_k(jnp.where(has_images[None, :], logits, -jnp.inf), min(5, logits.shape[1]))
    hits = (classes == labels[:, None]) & (highest > -jnp.inf)
    hits = jnp.where(jnp.isfinite(logits).all(), hits, jnp.nan)
    return jnp.sum(hits[:, 0]), jnp.sum(jnp.max(hits, axis=1))
