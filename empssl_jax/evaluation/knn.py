"""Weighted k-nearest-neighbour classification of embeddings by cosine similarity."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from empssl_jax.config.errors import counted, require
from empssl_jax.method.losses import normalise
from empssl_jax.runtime.devices import DATA_AXIS, padded, replicated, split_images, to_devices, to_host


def knn_scores(
    queries: Float[Array, "Q E"],
    bank: Float[Array, "N E"],
    bank_labels: Int[Array, " N"],
    *,
    num_classes: int,
    num_neighbours: int,
    temperature: float,
    queries_at_once: int = 1024,
) -> Float[Array, "Q C"]:
    """Votes of each query's nearest neighbours for each class (Wu et al. 2018, section 3.4).

    A neighbour with cosine similarity s has exp(s / temperature) votes; a class without neighbours has exactly 0.
    Memory grows with `queries_at_once`, not with the number of queries.

    Args:
        queries: embeddings to classify; their length does not matter.
        bank: labelled embeddings; their length does not matter.
        bank_labels: class of each embedding in the bank, from 0 to `num_classes` - 1.
        num_classes: C.
        num_neighbours: number of neighbours that vote, at most N.
        temperature: at least 0.02, so that no vote overflows float32 or is rounded to 0.
        queries_at_once: number of queries compared with the bank at a time.

    Raises:
        UserError: the bank has fewer than `num_neighbours` embeddings.
    """
    check_num_neighbours(num_neighbours, len(bank))
    return _scores(queries, bank, bank_labels, num_classes, num_neighbours, temperature, queries_at_once)


def sharded_knn_scores(
    mesh: Mesh,
    queries: Float[np.ndarray, "Q E"],
    bank: Float[np.ndarray, "N E"],
    bank_labels: Int[np.ndarray, " N"],
    **options: Any,
) -> Float[np.ndarray, "Q C"]:
    """`knn_scores` with the queries split over the devices of all processes. Each device holds a copy of the bank."""
    arrays = to_devices(padded(queries, mesh), split_images(mesh)), *to_devices((bank, bank_labels), replicated(mesh))
    return to_host(_compiled_scores(mesh, **options)(*arrays))[: len(queries)]


@functools.cache
def _compiled_scores(mesh: Mesh, **options: Any) -> Callable[..., Float[Array, "Q C"]]:
    """`knn_scores` with the given options. In the online probe, it is compiled once for all measurements."""
    copied, split = PartitionSpec(), PartitionSpec(DATA_AXIS)
    scores = functools.partial(knn_scores, **options)
    return jax.jit(jax.shard_map(scores, mesh=mesh, in_specs=(split, copied, copied), out_specs=split))


@functools.partial(jax.jit, static_argnums=(3, 4, 6))
def _scores(
    queries: Float[Array, "Q E"],
    bank: Float[Array, "N E"],
    bank_labels: Int[Array, " N"],
    num_classes: int,
    num_neighbours: int,
    temperature: float | Float[Array, ""],
    queries_at_once: int,
) -> Float[Array, "Q C"]:
    # Transposed once: on CPU, XLA takes three times as long to multiply rows by rows as rows by columns.
    columns = normalise(bank).T

    def scores_of(query: Float[Array, " E"]) -> Float[Array, " C"]:
        similarities = jnp.einsum("e,en->n", normalise(query), columns, precision=jax.lax.Precision.HIGHEST)
        nearest, indices = jax.lax.top_k(similarities, num_neighbours)
        return jnp.zeros(num_classes).at[bank_labels[indices]].add(jnp.exp(nearest / temperature))

    return jax.lax.map(scores_of, queries, batch_size=queries_at_once)


def check_num_neighbours(num_neighbours: int, num_images: int) -> None:
    """Raises UserError if there are fewer than `num_neighbours` images."""
    remedy = f"that is more than the {counted(num_images, 'labelled training image')}, so give at most that many"
    require(num_neighbours <= num_images, "num_neighbours", num_neighbours, remedy)
