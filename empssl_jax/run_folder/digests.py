"""Digests of arrays: a checkpoint stores them when it is saved and compares them when it is restored."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

Digests = dict[str, str]


def array_digests(tree: PyTree) -> Digests:
    """SHA-256 of each array of a pytree, including its shape and type, by its path."""

    def digest_of(item: tuple[jax.tree_util.KeyPath, Array | np.ndarray]) -> tuple[str, str]:
        return jax.tree_util.keystr(item[0]), _digest(np.asarray(item[1]))

    # In threads, because copying from the device and hashing take one thread long for a large encoder.
    with ThreadPoolExecutor() as pool:
        return dict(pool.map(digest_of, jax.tree.leaves_with_path(tree)))


def first_not_finite(tree: PyTree) -> str | None:
    """Path of the first array of a pytree that holds NaN or an infinity, None if there is none."""
    leaves = jax.tree.leaves_with_path(tree)
    bad = (jax.tree_util.keystr(path) for path, leaf in leaves if not np.isfinite(np.asarray(leaf)).all())
    return next(bad, None)


def seal(record: dict[str, Any]) -> dict[str, Any]:
    """A copy of a JSON-serializable record with a digest of itself."""
    return record | {"seal": text_digest(record)}


def is_sealed(record: object) -> bool:
    """Whether a record is unchanged since `seal` returned it."""
    if not isinstance(record, dict):
        return False
    rest = {name: value for name, value in record.items() if name != "seal"}
    return record.get("seal") == text_digest(rest)


def text_digest(record: dict[str, Any]) -> str:
    """SHA-256 of a JSON-serializable record, whatever the order of its entries."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _digest(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
