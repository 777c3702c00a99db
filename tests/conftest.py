"""Checks annotated shapes and types during the tests, and provides golden numbers and a tiny run."""

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

# Eight virtual CPU devices, so that tests of the train step can use one or all.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

# Annotations are checked in every module except these. The config checks its values itself and is tested with wrong
# types, and the command line and the image encoder refuse wrong input with their own messages.
UNCHECKED = ("config.", "command_line", "report.page", "inference.image_encoder", "inference.embed_files")
PACKAGE = Path(__file__).parents[1] / "empssl_jax"


def checked_modules() -> list[str]:
    """The modules whose annotations are checked."""
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py") if path.stem[0] != "_"]
    modules = [".".join(path.parts) for path in paths]
    return [f"empssl_jax.{name}" for name in modules if not name.startswith(UNCHECKED)]


jaxtyping.install_import_hook(checked_modules(), "typecheck.checked")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """A function that loads tests/golden/NAME.npz as a dictionary."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
            return dict(arrays)

    return load


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on digits: two steps on 80 images, each saved, and 10 test images.

    The run is trained once and copied for each of pytest's processes.
    """
    own = tmp_path_factory.getbasetemp()
    trained = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "digits"
    with (trained.parent / "digits.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (trained / "results.json").exists():
            train_tiny_run(trained)
    return shutil.copytree(trained, own / "runs" / "digits")


def train_tiny_run(workdir: Path) -> None:
    """Trains the run of `tiny_run`."""
    from empssl_jax import config, training

    made = config.Config(
        data=config.DataConfig(dataset="digits", images_per_class=8, test_images_per_class=1),
        patches=config.PatchConfig(train_patches=2, patch_size=16),
        model=config.ModelConfig(width=4, hidden_dim=32, projection_dim=16, precision="float32"),
        training=config.TrainingConfig(batch_size=40),
        evaluation=config.EvaluationConfig(valid_patches=2, embedding_batch_size=32, linear_epochs=0, report=False),
        run=config.RunConfig(workdir=str(workdir), checkpoint_every=1),
    )
    training.train(made)


def torch_weights(names: Iterable[str], seed: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Draws a torch state dictionary in the given order of names, by the rule that the golden networks were made with.

    running_mean is 0 and running_var is 1. One-dimensional weights are 1 + 0.1 n, other one-dimensional arrays 0.1 n,
    and kernels n sqrt(2 / fan_in), with n standard normal.
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


def torch_names(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Maps each name in a torch state dictionary to the path of the same array in the encoder's state.

    The names are those of torchvision's ResNets, of the PyTorch Lightning reference, which numbers its layers, or of
    the authors' checkpoints. Biases before a BatchNorm also get paths, although the encoder has no such arrays.
    """
    heads = {"8.1": "hidden", "8.2": "hidden_norm", "projector.0": "projector", "projector.1": "projector_norm"}
    heads |= {"projector.3": "projection", "0": "backbone/stem", "1": "backbone/norm"}
    heads |= {"conv1": "backbone/stem", "bn1": "backbone/norm", "pre_feature.0": "hidden"}
    heads |= {"pre_feature.1": "hidden_norm", "projection.0": "projector", "projection.1": "projector_norm"}
    heads |= {"projection.3": "projection"}
    parts = {f"conv{i}": f"conv{i}" for i in (1, 2, 3)} | {f"bn{i}": f"norm{i}" for i in (1, 2, 3)}
    parts |= {"downsample.0": "shortcut/layers/0", "downsample.1": "shortcut/layers/1"}

    def position(module: str) -> tuple[str, int, str] | None:
        """Stage, number and part of a layer in a residual block; None for other layers."""
        match = re.fullmatch(r"(layer[1-4]|[3-6])\.([0-9]+)\.(.+)", module)
        return (match[1], int(match[2]), match[3]) if match else None

    names = [name for name in map(str, names) if not name.endswith("num_batches_tracked")]
    modules = {name: name.removeprefix("module.").removeprefix("backbone.").rsplit(".", 1)[0] for name in names}
    blocks = sorted({block[:2] for module in modules.values() if (block := position(module))})
    paths = {}
    for name, module in modules.items():
        block = position(module)
        path = f"backbone/blocks/{blocks.index(block[:2])}/{parts[block[2]]}" if block else heads[module]
        is_norm = "norm" in path.rsplit("/", 1)[-1] or path.endswith("layers/1")
        leaves = {
            "weight": "scale" if is_norm else "kernel",
            "bias": "bias",
            "running_mean": "mean",
            "running_var": "var",
        }
        paths[name] = (*path.split("/"), leaves[name.rsplit(".", 1)[1]])
    return paths


def golden_state(state: Any, names: Iterable[str], seed: int) -> Any:
    """An encoder's state with its weights replaced by those that `torch_weights` draws."""
    state, paths = jax.tree.map(np.array, state), torch_names(names)

    def tree_of(name: str) -> Any:
        return state.batch_stats if "running" in name else state.params

    shapes = {name: to_torch_layout(leaf(tree_of(name), path)).shape for name, path in paths.items()}
    weights = torch_weights(names, seed, shapes)
    for name, path in paths.items():
        leaf(tree_of(name), path[:-1])[path[-1]] = np.float32(from_torch_layout(weights[name]))
    return jax.tree.map(jnp.asarray, state)


def to_torch_layout(array: np.ndarray) -> np.ndarray:
    """From (kh, kw, I, O) and (I, O) to torch's (O, I, kh, kw) and (O, I)."""
    return np.transpose(array, {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim])


def from_torch_layout(array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch_layout`."""
    return np.transpose(array, {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim])


def leaf(tree: Any, path: tuple[str, ...]) -> Any:
    """The array at a path in nested dictionaries, whose keys for block numbers may be integers."""
    for part in path:
        tree = tree[part] if part in tree else tree[int(part)]
    return tree
