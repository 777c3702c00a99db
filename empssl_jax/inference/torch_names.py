"""Converts the encoder's arrays to and from the names and layouts of PyTorch.

The ResNet's arrays have torchvision's names, prefixed by `backbone.`; the heads have the names of the authors'
checkpoints. In PyTorch, kernels have shapes (O, I, kh, kw) and (O, I). The authors' encoder has two biases that this
one does not have, each before a BatchNorm. In training, BatchNorm subtracts them together with the mean. In evaluation,

    BatchNorm(W x + bias; running mean m) = BatchNorm(W x; running mean m - bias).

Therefore reading subtracts each bias from the running mean, and writing sets it to 0.
"""

import functools
from collections.abc import Iterable

import jax
import numpy as np
from jaxtyping import Float, Shaped

from empssl_jax.config import ModelConfig
from empssl_jax.config.errors import UserError
from empssl_jax.method.encoder import EncoderState, encoder_template
from empssl_jax.method.resnet import BACKBONES

TorchWeights = dict[str, Shaped[np.ndarray, "..."]]

STEM = {"stem": "conv1", "norm": "bn1"}
PARTS = {f"conv{i}": f"conv{i}" for i in (1, 2, 3)} | {f"norm{i}": f"bn{i}" for i in (1, 2, 3)}
PARTS |= {"shortcut/layers/0": "downsample.0", "shortcut/layers/1": "downsample.1"}
HEADS = {
    "hidden": "pre_feature.0",
    "hidden_norm": "pre_feature.1",
    "projector": "projection.0",
    "projector_norm": "projection.1",
    "projection": "projection.3",
}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
FOLDED = {
    "pre_feature.0.bias": "pre_feature.1.running_mean",
    "projection.0.bias": "projection.1.running_mean",
}
COUNTER = "num_batches_tracked"  # torch's BatchNorm stores it but does not use it
LISTED = 10  # at most so many names in a message


def to_torch(state: EncoderState, config: ModelConfig, step: int) -> TorchWeights:
    """Converts an encoder to a PyTorch state dictionary of float32 arrays; BatchNorm's batch counters are `step`."""
    names = _names(state, config)
    arrays = map(np.asarray, jax.tree.leaves(state))
    weights = {name: _to_torch_layout(array) for name, array in zip(names, arrays, strict=True)}
    counters = [name.replace("running_mean", COUNTER) for name in names if name.endswith("running_mean")]
    weights |= {bias: np.zeros_like(weights[mean]) for bias, mean in FOLDED.items()}
    return weights | {name: np.array(step, np.int64) for name in counters}


def from_torch(weights: TorchWeights) -> tuple[ModelConfig, EncoderState]:
    """Converts a PyTorch state dictionary to an encoder: its config, with precision float32, and its arrays.

    Names may have the prefix `module.`, as in the authors' checkpoints.

    Raises:
        UserError: names are missing or unexpected, an array has the wrong shape, or a value is not finite.
    """
    weights = {name.removeprefix("module."): array for name, array in weights.items() if not name.endswith(COUNTER)}
    config = _config_of(weights)
    template = encoder_template(config)
    names = _names(template, config)
    _check_arrays(weights, dict(zip(names, jax.tree.leaves(template), strict=True)))
    folded = {mean: weights[mean] - weights[bias] for bias, mean in FOLDED.items()}
    arrays = [_from_torch_layout((weights | folded)[name]) for name in names]
    return config, jax.tree.unflatten(jax.tree.structure(template), arrays)


def _names(state: EncoderState, config: ModelConfig) -> list[str]:
    """The PyTorch name of each array, in the order of `jax.tree.leaves`."""
    stages = enumerate(BACKBONES[config.backbone].stage_sizes, start=1)
    blocks = [f"layer{stage}.{number}" for stage, size in stages for number in range(size)]

    def name(path: jax.tree_util.KeyPath) -> str:
        _, *modules, leaf = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if modules[0] != "backbone":
            module = HEADS[modules[0]]
        elif modules[1] == "blocks":
            module = f"backbone.{blocks[int(modules[2])]}.{PARTS['/'.join(modules[3:])]}"
        else:
            module = f"backbone.{STEM[modules[1]]}"
        return f"{module}.{LEAVES[leaf]}"

    return [name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]


@functools.cache
def _expected_names(backbone: str) -> frozenset[str]:
    config = ModelConfig(backbone=backbone, width=1, hidden_dim=1, projection_dim=2, precision="float32")  # type: ignore[arg-type]
    return frozenset([*_names(encoder_template(config), config), *FOLDED])


def _config_of(weights: TorchWeights) -> ModelConfig:
    """The config of the encoder with these arrays, inferred from their names and a few of their shapes."""
    expected = {backbone: _expected_names(backbone) for backbone in BACKBONES}
    backbone = min(expected, key=lambda name: len(expected[name] ^ weights.keys()))
    missing, unexpected = expected[backbone] - weights.keys(), weights.keys() - expected[backbone]
    if missing or unexpected:
        raise UserError(
            f"These are not the arrays of an EMP-SSL encoder with a {backbone}: {_listed('missing', missing)}; "
            f"{_listed('unexpected', unexpected)}; give a file written by `export` or by the authors' code."
        )
    stem, hidden, projection = (
        weights[f"{name}.weight"] for name in ("backbone.conv1", "pre_feature.0", "projection.3")
    )
    if (stem.ndim, hidden.ndim, projection.ndim) != (4, 2, 2):
        raise UserError(f"The kernels have shapes {stem.shape}, {hidden.shape}, {projection.shape}: give another file.")
    return ModelConfig(
        backbone=backbone,  # type: ignore[arg-type]
        stem="imagenet" if stem.shape[-1] == 7 else "cifar",
        width=stem.shape[0],
        hidden_dim=hidden.shape[0],
        projection_dim=projection.shape[0],
        precision="float32",
    )


def _check_arrays(weights: TorchWeights, template: dict[str, jax.ShapeDtypeStruct]) -> None:
    shapes = {name: _torch_shape(array.shape) for name, array in template.items()}
    shapes |= {bias: shapes[mean] for bias, mean in FOLDED.items()}
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise UserError(f"{name} has shape {weights[name].shape} instead of {shape}: give another file.")
        if not np.isfinite(weights[name]).all():
            raise UserError(f"{name} is not finite: give a file from before training went wrong.")


def _listed(what: str, names: Iterable[str]) -> str:
    """The number of names and the first few of them, for a message."""
    ordered = [repr(name)[1:-1][:60] for name in sorted(names)]
    more = f" and {len(ordered) - LISTED} more" if len(ordered) > LISTED else ""
    return f"{len(ordered)} {what}{': ' * bool(ordered)}{', '.join(ordered[:LISTED])}{more}"


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def _to_torch_layout(array: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Transposes (kh, kw, I, O), (I, O) and (C,) to (O, I, kh, kw), (O, I) and (C,)."""
    return np.ascontiguousarray(np.transpose(array, (3, 2, 0, 1)) if array.ndim == 4 else array.T)


def _from_torch_layout(array: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """The inverse of `_to_torch_layout`."""
    return np.ascontiguousarray(np.transpose(array, (2, 3, 1, 0)) if array.ndim == 4 else array.T)
