"""Weighted k-nearest-neighbour classification of embeddings by cosine similarity."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from empssl_jax.config.errors import require
from empssl_jax.method.losses import normalise
from empssl_jax.runtime.devices import replicated, split_images, to_devices, to_host


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

    A neighbour of cosine similarity s has exp(s / temperature) votes. Memory grows with `queries_at_once`, not with
    the number of queries.

    Args:
        queries: embeddings to classify, of any length.
        bank: labelled embeddings.
        bank_labels: class of each, 0 to `num_classes` - 1.
        num_classes: C.
        num_neighbours: k, at most the size of the bank.
        temperature: positive.
        queries_at_once: queries compared with the bank together.
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
    """`knn_scores` with the queries split over the devices of all processes; each device has the whole bank."""
    copied, split = replicated(mesh), split_images(mesh)
    padded = np.pad(queries, ((0, -len(queries) % mesh.size), (0, 0)))
    scores = jax.shard_map(
        functools.partial(knn_scores, **options),
        mesh=mesh,
        in_specs=(split.spec, copied.spec, copied.spec),
        out_specs=split.spec,
    )
    arrays = to_devices(padded, split), to_devices(bank, copied), to_devices(bank_labels, copied)
    return to_host(jax.jit(scores)(*arrays))[: len(queries)]


@functools.partial(jax.jit, static_argnums=(3, 4, 6))
def _scores(queries, bank, bank_labels, num_classes, num_neighbours, temperature, queries_at_once):
    # Turned once: XLA's CPU product of rows with rows takes three times as long as that of rows with columns.
    columns = normalise(bank).T

    def scores_of(query):
        similarities = jnp.einsum("e,en->n", normalise(query), columns, precision=jax.lax.Precision.HIGHEST)
        nearest, indices = jax.lax.top_k(similarities, num_neighbours)
        return jnp.zeros(num_classes).at[bank_labels[indices]].add(jnp.exp(nearest / temperature))

    return jax.lax.map(scores_of, queries, batch_size=queries_at_once)


def check_num_neighbours(num_neighbours: int, num_images: int) -> None:
    """Raises UserError if there are fewer images to look among than neighbours are asked for."""
    remedy = f"there are only {num_images} training images to look among"
    require(num_neighbours <= num_images, "num_neighbours", num_neighbours, remedy)


def top_k_accuracy(scores: Float[Array, "Q C"], labels: Int[Array, " Q"], k: int) -> float:
    """Fraction of queries whose class is among the k of the highest scores; of equal scores the lower class counts."""
    _, classes = jax.lax.top_k(scores, min(k, scores.shape[1]))
    # Divided in double precision: 9 of 10 in float32 is less than 0.9.
    return float(np.mean(np.asarray(jnp.any(classes == labels[:, None], axis=1))))
