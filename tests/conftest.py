"""Shapes in annotations are checked while the tests run; golden numbers come from tests/golden/."""

import os
import re
from pathlib import Path

import jaxtyping
import numpy as np
import pytest

# Eight virtual CPU devices, so that every test of the train step can choose between one and eight.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

# Not the config: it checks its values itself, and is tested with values of wrong types.
CHECKED = ("batch_norm", "checkpoints", "data", "digests", "embeddings", "evaluation", "keys", "knn", "lars", "linear")
CHECKED += ("losses", "metrics", "models", "patches", "probe", "reductions", "tfds_images", "training", "workdir")
CHECKED += ("report.findings", "report.pictures")
jaxtyping.install_import_hook([f"empssl_jax.{name}" for name in CHECKED], "beartype.beartype")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """Loads tests/golden/NAME.npz as a dictionary."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
            return dict(arrays)

    return load


def torch_weights(names, seed: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Draws a torch state dictionary, name by name in the order given: the rule that the golden networks were made by.

    running_mean is 0 and running_var 1; one-dimensional weights are 1 + 0.1 n, other one-dimensional arrays 0.1 n, and
    kernels n sqrt(2 / fan_in), with n standard normal.
    """
    random = np.random.RandomState(seed)
    weights = {}
    for name in names:
        shape = shapes.get(name)
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_mean"):
            weights[name] = np.zeros(shape)
        elif name.endswith("running_var"):
            weights[name] = np.ones(shape)
        elif len(shape) == 1:
            weights[name] = (1.0 if name.endswith(".weight") else 0.0) + 0.1 * random.standard_normal(shape)
        else:
            weights[name] = random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    return weights


def torch_names(names) -> dict[str, tuple[str, ...]]:
    """For each name in a torch state dictionary the path of the same array in the encoder's state."""
    heads = {"8.1": "hidden", "8.2": "hidden_norm", "projector.0": "projector", "projector.1": "projector_norm"}
    heads |= {"projector.3": "projection", "0": "backbone/stem", "1": "backbone/norm"}
    parts = {"conv1": "conv1", "bn1": "norm1", "conv2": "conv2", "bn2": "norm2"}
    parts |= {"downsample.0": "shortcut/layers/0", "downsample.1": "shortcut/layers/1"}
    paths = {}
    for name in map(str, names):
        module, leaf = name.removeprefix("backbone.").rsplit(".", 1)
        if leaf == "num_batches_tracked":
            continue
        if block := re.fullmatch(r"([3-6])\.([01])\.(.+)", module):
            stage, number, part = block.groups()
            path = f"backbone/blocks/{2 * (int(stage) - 3) + int(number)}/{parts[part]}"
        else:
            path = heads[module]
        is_norm = "norm" in path.rsplit("/", 1)[-1] or path.endswith("layers/1")
        leaves = {
            "weight": "scale" if is_norm else "kernel",
            "bias": "bias",
            "running_mean": "mean",
            "running_var": "var",
        }
        paths[name] = (*path.split("/"), leaves[leaf])
    return paths


def to_torch_layout(array: np.ndarray) -> np.ndarray:
    """From (kh, kw, I, O) and (I, O) to torch's (O, I, kh, kw) and (O, I)."""
    return np.transpose(array, {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim])


def from_torch_layout(array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch_layout`."""
    return np.transpose(array, {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim])


def leaf(tree, path: tuple[str, ...]):
    """The array at a path of nested dictionaries; block numbers may be integers there."""
    for part in path:
        tree = tree[part] if part in tree else tree[int(part)]
    return tree
