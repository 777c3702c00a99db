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

from empssl_jax.config import Config, ModelConfig, PatchConfig
from empssl_jax.method.encoder import EncoderState, encoder_graph, encoder_state, init_encoder, is_layer
from empssl_jax.method.hyperparameters import Hyperparameters, learning_rate
from empssl_jax.method.lars import lars
from empssl_jax.method.losses import Loss, emp_ssl_loss, normalise
from empssl_jax.method.patches import multi_patch
from empssl_jax.method.random_keys import parameters_key, training_patches_key
from empssl_jax.method.xla_cpu import norm_pair, sequential_map
from empssl_jax.runtime.devices import DATA_AXIS, replicated


class TrainState(NamedTuple):
    """Everything that training changes."""

    step: Int[Array, ""]  # number of updates made so far
    encoder: EncoderState
    optimizer: optax.OptState


# Images and their indices in the data set, such as a `data.batches.Batch`.
IndexedImages = tuple[UInt8[Array | np.ndarray, "B H W 3"], Int[Array | np.ndarray, " B"]]
TrainStep = Callable[[Hyperparameters, TrainState, IndexedImages], tuple[TrainState, dict[str, Array]]]


def make_optimizer(hyperparameters: Hyperparameters) -> optax.GradientTransformation:
    """LARS with a run's schedule and options."""
    return lars(
        functools.partial(learning_rate, hyperparameters=hyperparameters),
        hyperparameters.weight_decay,
        momentum=hyperparameters.momentum,
        trust_coefficient=hyperparameters.trust_coefficient,
    )


@functools.partial(jax.jit, static_argnums=(0, 2))
def create_state(model: ModelConfig, hyperparameters: Hyperparameters, mesh: Mesh) -> TrainState:
    """The state before the first step, on all devices."""
    encoder = init_encoder(model, parameters_key(hyperparameters.seed))
    state = TrainState(jnp.zeros([], jnp.int32), encoder, make_optimizer(hyperparameters).init(encoder.params))
    return jax.lax.with_sharding_constraint(state, replicated(mesh))


def make_train_step(config: Config, mesh: Mesh) -> TrainStep:
    """The compiled step (hyperparameters, state, batch) -> (state, metrics), data parallel over the mesh's devices.

    It is `jax.jit(jax.shard_map(...))`, the successor of `jax.pmap`. Each device augments and encodes its share of the
    images. BatchNorm shares its statistics, and the devices exchange projections, so the coding rate and its gradient
    are those of the whole batch. Up to rounding, the result does not depend on the number of devices. The state is
    donated: the caller cannot use it afterwards.

    Configs that differ only in numbers of `Hyperparameters` share one step, and steps of equal batch sizes one compiled
    program.
    """
    return _compiled_step(config.model, config.patches, config.training.accumulate, config.run.remat, mesh)


@functools.cache
def _compiled_step(model: ModelConfig, patches_config: PatchConfig, pieces: int, remat: bool, mesh: Mesh) -> TrainStep:
    graph = encoder_graph(model, DATA_AXIS, remat)
    piece_size = patches_config.train_patches // pieces

    def step(
        hyperparameters: Hyperparameters, state: TrainState, batch: IndexedImages
    ) -> tuple[TrainState, dict[str, Array]]:
        images, indices = batch
        key = training_patches_key(hyperparameters.seed, state.step // hyperparameters.steps_per_epoch)

        def make_patches(piece: int | Int[Array, ""]) -> Float[Array, "B Q size size 3"]:
            first, crops = piece * piece_size, patches_config.crops
            return multi_patch(key, images, piece_size, indices=indices, first_patch=first, **crops)

        loss_fn = functools.partial(_batch_loss, hyperparameters, graph, make_patches, pieces)
        gradients, (loss, batch_stats) = jax.grad(loss_fn, has_aux=True)(*state.encoder)
        optimizer = make_optimizer(hyperparameters)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.encoder.params)
        encoder = EncoderState(optax.apply_updates(state.encoder.params, updates), batch_stats)
        update_norm, parameter_norm = norm_pair(updates, encoder.params)
        metrics = {
            "loss": loss.total,
            "coding_rate": loss.coding_rate,
            "similarity": loss.similarity,
            "learning_rate": learning_rate(state.step, hyperparameters),
            "update_norm": update_norm,
            "parameter_norm": parameter_norm,
        }
        return TrainState(state.step + 1, encoder, optimizer_state), metrics

    copied, split = PartitionSpec(), PartitionSpec(DATA_AXIS)
    sharded = jax.shard_map(step, mesh=mesh, in_specs=(copied, copied, split), out_specs=copied)
    return jax.jit(sharded, donate_argnums=1)


def _batch_loss(
    hyperparameters: Hyperparameters,
    graph: nnx.GraphDef,
    make_patches: Callable[[int | Int[Array, ""]], Float[Array, "B Q size size 3"]],
    pieces: int,
    params: PyTree[Float[Array, "..."]],
    batch_stats: PyTree[Float[Array, "..."]],
) -> tuple[Float[Array, ""], tuple[Loss, PyTree[Float[Array, "..."]]]]:
    """The loss of the patches, with its parts and the updated BatchNorm statistics. Runs inside `shard_map`."""
    params = _sum_gradients_in_float32(params)

    def project(piece: int | Int[Array, ""]) -> tuple[Float[Array, "Q B D"], PyTree[Float[Array, "..."]]]:
        """Projections of unit length of one piece of the patches, and the statistics after it."""
        encoder = nnx.merge(graph, params, batch_stats)
        encoder.train()
        patches = make_patches(piece)
        _, projections = encoder(patches.reshape(-1, *patches.shape[2:]))
        by_image = normalise(projections).reshape(*patches.shape[:2], -1)
        return jnp.swapaxes(by_image, 0, 1), encoder_state(encoder).batch_stats

    projections, new_stats = project(0) if pieces == 1 else _in_pieces(project, pieces)
    loss = emp_ssl_loss(projections, hyperparameters.invariance_coefficient, hyperparameters.coding_rate_eps, DATA_AXIS)
    return loss.total, (loss, new_stats)


def _in_pieces(
    project: Callable[..., tuple[Float[Array, "Q B D"], PyTree[Float[Array, "..."]]]], pieces: int
) -> tuple[Float[Array, "P B D"], PyTree[Float[Array, "..."]]]:
    """`project` of all pieces, one after the other: all projections, and the mean of the statistics.

    The backward pass computes each piece again, so activations of only one piece are in memory. The loss and its
    gradient w.r.t. the projections are those of the whole batch (Gao et al. 2021, arXiv 2101.06983).

    BatchNorm normalises each piece by its own statistics: those of the whole batch would need a pass for every layer.
    Pieces split the patches, not the images: then each has all images, as has each determinant and each device's share.
    """
    projections, batch_stats = sequential_map(jax.checkpoint(project), jnp.arange(pieces))
    mean_stats = jax.tree.map(lambda stats: jnp.mean(stats, axis=0), batch_stats)
    return projections.reshape(-1, *projections.shape[2:]), mean_stats


def _sum_gradients_in_float32(params: PyTree[Float[Array, "..."]]) -> PyTree[Float[Array, "..."]]:
    """Returns the parameters unchanged, and makes `shard_map` sum the layers' gradients over devices in float32.

    Otherwise it sums them where a layer has cast its parameters to bfloat16. BatchNorm sums its own gradients.
    """

    def varying(node: Any) -> Any:
        return jax.lax.pcast(node, DATA_AXIS, to="varying") if is_layer(node) else node

    return jax.tree.map(varying, params, is_leaf=is_layer)
