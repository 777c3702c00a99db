"""The mesh of all devices, how arrays are split over it, and how they get to and from the devices."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, PyTree, Shaped

DATA_AXIS = "data"  # the mesh axis that splits the images of a batch over devices


def device_mesh(num_devices: int | None = None) -> Mesh:
    """All devices, or the first `num_devices`, along the axis that splits the images of a batch."""
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((len(devices),), (DATA_AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def split_images(mesh: Mesh) -> NamedSharding:
    """Each device holds its share of the images."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Each device holds a full copy."""
    return NamedSharding(mesh, PartitionSpec())


def own_rows(mesh: Mesh, num_rows: int) -> Int[np.ndarray, " K"]:
    """Indices of the rows that this process's devices hold of an array split by `split_images`, ascending."""
    indices = split_images(mesh).addressable_devices_indices_map((num_rows,)).values()
    return np.unique(np.concatenate([np.arange(num_rows)[index] for index in indices]))


def rows_to_devices(
    own: Shaped[jax.Array | np.ndarray, "K *rest"], mesh: Mesh, num_rows: int
) -> Shaped[jax.Array, "N *rest"]:
    """A global array of `num_rows` rows, split over all devices. Each process passes the rows `own_rows`."""
    return jax.make_array_from_process_local_data(split_images(mesh), own, (num_rows, *own.shape[1:]))


def padded(array: Shaped[np.ndarray, "..."], mesh: Mesh, axis: int = 0) -> Shaped[np.ndarray, "..."]:
    """The array with zeros at the end of an axis, so that the devices get equal shares; a copy only if necessary."""
    missing = -array.shape[axis] % mesh.size
    if not missing:
        return array
    return np.pad(array, [(0, missing if number == axis else 0) for number in range(array.ndim)])


def to_devices(arrays: PyTree[Shaped[np.ndarray, "..."]], sharding: NamedSharding) -> Any:
    """Copies arrays to the devices. Every process has all of them, and sends what its own devices hold."""
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), arrays)


def to_host(array: jax.Array) -> np.ndarray:
    """Copies an array that is split over devices to the host. Every process gets all of it."""
    return multihost_utils.process_allgather(array, tiled=True)
