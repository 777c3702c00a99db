"""Shuffled batches of images: Grain shuffles, a thread prefetches, and each device gets its share."""

from collections.abc import Iterator
from typing import NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, Int32, UInt8

from empssl_jax.config import TrainingConfig
from empssl_jax.config.errors import counted, require
from empssl_jax.data.datasets import ImageDataset
from empssl_jax.runtime.devices import own_rows, rows_to_devices


class Batch(NamedTuple):
    """The images of one step and their indices in the data set."""

    images: UInt8[jax.Array | np.ndarray, "B H W 3"]
    indices: Int32[jax.Array | np.ndarray, " B"]


def shuffled_batches(
    dataset: ImageDataset,
    batch_size: int,
    seed: int,
    first_step: int,
    last_step: int,
    rows: Int[np.ndarray, " K"] | slice = slice(None),
) -> Iterator[Batch]:
    """Shuffled batches of the steps from `first_step` up to but not including `last_step`, prefetched by a thread.

    The batch of a step depends only on (seed, step). Each epoch is a new permutation without its incomplete last batch.

    Args:
        dataset: the images to shuffle.
        batch_size: images in a step.
        seed: determines the order.
        first_step: counted from the start of the run.
        last_step: the first step that is excluded.
        rows: which images of each batch to gather, see `own_rows`.

    Raises:
        UserError: the data set is smaller than a batch.
    """
    steps_per_epoch = count_steps(dataset, batch_size)

    def gather(indices: Int[np.ndarray, " B"]) -> Batch:
        own = indices[rows]
        return Batch(dataset.images[own], own.astype(np.int32))

    order = grain.MapDataset.range(len(dataset.labels)).shuffle(seed=seed).batch(batch_size, drop_remainder=True)
    steps = order.repeat(-(-last_step // steps_per_epoch)).slice(slice(first_step, last_step)).map(gather)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def device_batches(
    dataset: ImageDataset, config: TrainingConfig, first_step: int, last_step: int, mesh: Mesh
) -> Iterator[Batch]:
    """The batches of `shuffled_batches`, split over the devices."""
    size = config.batch_size
    for own in shuffled_batches(dataset, size, config.seed, first_step, last_step, own_rows(mesh, size)):
        yield Batch(*(rows_to_devices(array, mesh, size) for array in own))


def count_steps(dataset: ImageDataset, batch_size: int) -> int:
    """Number of full batches in an epoch; raises UserError if there is none."""
    remedy = f"that is more than the {counted(len(dataset.labels), 'training image')}, so give at most that many"
    require(batch_size <= len(dataset.labels), "batch_size", batch_size, remedy)
    return len(dataset.labels) // batch_size
