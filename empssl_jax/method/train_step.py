"""The train state, and the train step, which makes the next state from a state and a batch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree, UInt8

from empssl_jax.config import Config, TrainingConfig
from empssl_jax.method.encoder import EncoderState, encoder_graph, encoder_state, init_encoder, is_layer
from empssl_jax.method.lars import lars
from empssl_jax.method.losses import Loss, emp_ssl_loss, normalise
from empssl_jax.method.patches import multi_patch
from empssl_jax.method.random_keys import parameters_key, training_patches_key
from empssl_jax.method.xla_cpu import norm_pair
from empssl_jax.runtime.devices import DATA_AXIS


class TrainState(NamedTuple):
    """Everything that training changes."""

    step: Int[Array, ""]  # number of updates made so far
    encoder: EncoderState
    optimizer: optax.OptState


# Images, and their indices in the data set.
Batch = tuple[UInt8[Array | np.ndarray, "B H W 3"], Int[Array | np.ndarray, " B"]]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def learning_rate_schedule(config: TrainingConfig, steps_per_epoch: int) -> optax.Schedule:
    """A half cosine from the learning rate to 0 over all steps, after a linear warm-up if there is one.

    The warm-up begins above 0. At a rate of 0, LARS's clipping would let the whole gradient into its momentum, and the
    next steps, at a higher rate, would make the encoder collapse.
    """
    last_step = config.max_epochs * steps_per_epoch
    warmup_steps = min(round(config.warmup_epochs * steps_per_epoch), last_step - 1)
    cosine_steps = last_step - warmup_steps
    cosine = optax.cosine_decay_schedule(config.learning_rate, cosine_steps)
    rise = optax.linear_schedule(config.learning_rate / (warmup_steps + 1), config.learning_rate, warmup_steps)
    return optax.join_schedules([rise, cosine], [warmup_steps]) if warmup_steps else cosine


def make_optimizer(config: TrainingConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """LARS with the config's options."""
    return lars(schedule, config.weight_decay, momentum=config.momentum, trust_coefficient=config.trust_coefficient)


def create_state(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    encoder = init_encoder(config.model, parameters_key(config.training.seed))
    return TrainState(jnp.zeros([], jnp.int32), encoder, optimizer.init(encoder.params))


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation, schedule: optax.Schedule, steps_per_epoch: int, mesh: Mesh
) -> TrainStep:
    """The compiled step (state, batch) -> (state, metrics), data parallel over the devices of the mesh.

    It is `jax.jit(jax.shard_map(...))`, the successor of `jax.pmap`. Each device augments and encodes its share of the
    images. BatchNorm shares its statistics, and the devices exchange projections, so the coding rate and its gradient
    are those of the whole batch. Up to rounding, the result does not depend on the number of devices. The state is
    donated: the caller cannot use it afterwards.
    """
    loss_fn = functools.partial(_batch_loss, config.training, encoder_graph(config.model, DATA_AXIS, config.run.remat))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        images, indices = batch
        patches = multi_patch(
            training_patches_key(config.training.seed, state.step // steps_per_epoch),
            images,
            config.patches.train_patches,
            indices=indices,
            **config.patches.crops,
        )
        gradients, (loss, batch_stats) = jax.grad(loss_fn, has_aux=True)(*state.encoder, patches)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.encoder.params)
        encoder = EncoderState(optax.apply_updates(state.encoder.params, updates), batch_stats)
        update_norm, parameter_norm = norm_pair(updates, encoder.params)
        metrics = {
            "loss": loss.total,
            "coding_rate": loss.coding_rate,
            "similarity": loss.similarity,
            "learning_rate": schedule(state.step),
            "update_norm": update_norm,
            "parameter_norm": parameter_norm,
        }
        return TrainState(state.step + 1, encoder, optimizer_state), metrics

    replicated, split = PartitionSpec(), PartitionSpec(DATA_AXIS)
    sharded = jax.shard_map(step, mesh=mesh, in_specs=(replicated, split), out_specs=replicated)
    return jax.jit(sharded, donate_argnums=0)


def _batch_loss(
    config: TrainingConfig,
    graph: nnx.GraphDef,
    params: PyTree[Float[Array, "..."]],
    batch_stats: PyTree[Float[Array, "..."]],
    patches: Float[Array, "B P H W 3"],
) -> tuple[Float[Array, ""], tuple[Loss, PyTree[Float[Array, "..."]]]]:
    """The loss of the patches, with its parts and the updated BatchNorm statistics. Runs inside `shard_map`."""
    num_images, num_patches = patches.shape[:2]
    encoder = nnx.merge(graph, _sum_gradients_in_float32(params), batch_stats)
    encoder.train()
    _, projections = encoder(patches.reshape(-1, *patches.shape[2:]))
    by_patch = jnp.swapaxes(normalise(projections).reshape(num_images, num_patches, -1), 0, 1)
    loss = emp_ssl_loss(by_patch, config.invariance_coefficient, config.coding_rate_eps, DATA_AXIS)
    return loss.total, (loss, encoder_state(encoder).batch_stats)


def _sum_gradients_in_float32(params: PyTree[Float[Array, "..."]]) -> PyTree[Float[Array, "..."]]:
    """Returns the parameters unchanged, and makes `shard_map` sum the layers' gradients over devices in float32.

    Otherwise it sums them where a layer has cast its parameters to bfloat16. BatchNorm sums its own gradients.
    """

    def varying(node: Any) -> Any:
        return jax.lax.pcast(node, DATA_AXIS, to="varying") if is_layer(node) else node

    return jax.tree.map(varying, params, is_leaf=is_layer)
