"""The train step of a config as the benchmarks measure it: traced, compiled, its arguments, and its work."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from benchmarks.sizes import IMAGE_SIDE, Work, random_images
from empssl_jax.config import Config
from empssl_jax.data.batches import Batch
from empssl_jax.method.hyperparameters import Hyperparameters
from empssl_jax.method.train_step import TrainState, create_state, make_train_step
from empssl_jax.runtime.devices import device_mesh, replicated, split_images, to_devices

STEPS_PER_EPOCH = 500  # an argument of the program; neither time nor memory depends on its value

Arguments = tuple[Hyperparameters, TrainState, Batch]


def step_arguments(config: Config, mesh: Mesh) -> Arguments:
    """Arguments of the train step on the devices: the initial state and a batch of random images."""
    hyperparameters = to_devices(Hyperparameters.of(config.training, STEPS_PER_EPOCH), replicated(mesh))
    state = create_state(config.model, hyperparameters, mesh)
    size = config.training.batch_size
    batch = Batch(random_images(size, config.data.image_size or IMAGE_SIDE), np.arange(size, dtype=np.int32))
    return hyperparameters, state, jax.device_put(batch, split_images(mesh))


def abstract_arguments(config: Config, mesh: Mesh) -> Arguments:
    """The shapes, types and shardings of `step_arguments`, for devices that need not exist."""
    hyperparameters = Hyperparameters.of(config.training, STEPS_PER_EPOCH)
    state = create_state.eval_shape(config.model, hyperparameters, mesh)
    size, side = config.training.batch_size, config.data.image_size or IMAGE_SIDE
    batch = Batch(np.empty((size, side, side, 3), np.uint8), np.empty(size, np.int32))
    copied = replicated(mesh)
    return _abstract(hyperparameters, copied), _abstract(state, copied), _abstract(batch, split_images(mesh))


def _abstract(arrays: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays)


def trace_step(config: Config, mesh: Mesh, arguments: Arguments) -> jax.stages.Traced:
    """The train step traced with arguments, which may be abstract."""
    step: Any = make_train_step(config, mesh)
    return step.trace(*arguments)


def compile_step(config: Config, mesh: Mesh) -> jax.stages.Compiled:
    """The train step compiled for the devices of a mesh, which need not exist."""
    return trace_step(config, mesh, abstract_arguments(config, mesh)).lower().compile()


def ready_step(config: Config, num_devices: int = 1) -> tuple[jax.stages.Compiled, Arguments]:
    """The compiled train step and its arguments on the devices, which prepare them while it is traced."""
    mesh = device_mesh(num_devices)
    arguments = step_arguments(config, mesh)
    return trace_step(config, mesh, arguments).lower().compile(), arguments


def work_of(step: jax.stages.Compiled, arguments: Arguments) -> Work:
    """The work of one train step after the other. The first one donates the state in the arguments."""
    hyperparameters, state, batch = arguments

    def work() -> dict[str, Array]:
        nonlocal state
        state, metrics = step(hyperparameters, state, batch)
        return jax.block_until_ready(metrics)

    return work
