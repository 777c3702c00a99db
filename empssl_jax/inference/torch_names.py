"""Converts the encoder's arrays to and from the names and layouts of PyTorch.

The ResNet's arrays have torchvision's names, prefixed by `backbone.`; the heads have the names of the authors'
checkpoints. In PyTorch, kernels have shapes (O, I, kh, kw) and (O, I). The authors' encoder has two biases that this
one does not have, each before a BatchNorm. In training, BatchNorm subtracts them together with the mean. In evaluation,

    BatchNorm(W x + bias; running mean m) = BatchNorm(W x; running mean m - bias).

Therefore reading subtracts each bias from the running mean, and writing sets it to 0.
"""

import functools
from collections.abc import Iterable
from typing import Literal

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from empssl_jax.config import ModelConfig
from empssl_jax.config.errors import UserError
from empssl_jax.config.options import BackboneName
from empssl_jax.inference.weight_files import Weights
from empssl_jax.inference.wrappers import Unwrapped
from empssl_jax.method.encoder import EncoderState, encoder_template, init_encoder
from empssl_jax.method.resnet import BACKBONES

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
COUNTER = "num_batches_tracked"
COUNTERS = (COUNTER, "n_averaged")  # torch's BatchNorm and AveragedModel store them; no output depends on them
RESNET, CLASSIFIER = "backbone.", "fc."
LISTED = 10  # at most so many names in a message


def to_torch(state: EncoderState, config: ModelConfig, step: int) -> Weights:
    """Converts an encoder to a PyTorch state dictionary of float32 arrays; BatchNorm's batch counters are `step`."""
    names = _names(state, config)
    arrays = map(np.asarray, jax.tree.leaves(state))
    weights = {name: _to_torch_layout(array) for name, array in zip(names, arrays, strict=True)}
    counters = [name.replace("running_mean", COUNTER) for name in names if name.endswith("running_mean")]
    weights |= {bias: np.zeros_like(weights[mean]) for bias, mean in FOLDED.items()}
    return weights | {name: np.array(step, np.int64) for name in counters}


def from_torch(weights: Weights) -> tuple[ModelConfig, EncoderState]:
    """Converts a PyTorch state dictionary to an encoder: its sizes, with precision float32, and its arrays.

    Raises:
        UserError: names are missing or unexpected, an array has the wrong shape, or a value is not valid.
    """
    backbone = _backbone(weights, alone=False)
    stem, hidden, projection = (
        weights[f"{name}.weight"] for name in ("backbone.conv1", "pre_feature.0", "projection.3")
    )
    if (stem.ndim, hidden.ndim, projection.ndim) != (4, 2, 2):
        raise UserError(f"The kernels have shapes {stem.shape}, {hidden.shape}, {projection.shape}: give another file.")
    config = _config(backbone, stem.shape, hidden_dim=hidden.shape[0], projection_dim=projection.shape[0])
    template = encoder_template(config)
    names = _names(template, config)
    shapes = dict(zip(names, (_torch_shape(array.shape) for array in jax.tree.leaves(template)), strict=True))
    _check_arrays(weights, shapes | {bias: shapes[mean] for bias, mean in FOLDED.items()})
    with np.errstate(over="ignore"):  # _check_arrays refuses what becomes infinite
        folded = {mean: weights[mean] - weights[bias] for bias, mean in FOLDED.items()}
    _check_arrays(folded, {mean: shapes[mean] for mean in folded})
    arrays = [_from_torch_layout((weights | folded)[name]) for name in names]
    return config, jax.tree.unflatten(jax.tree.structure(template), arrays)


def with_fresh_heads(unwrapped: Unwrapped, model: ModelConfig, key: Key[Array, ""] | None) -> tuple[Weights, list[str]]:
    """Adds initial heads, with the dimensions of `model`, to a ResNet, which has its own sizes; without a key, zeros.

    Returns a state dictionary for `from_torch`, and the names of the arrays that are dropped: those of the ResNet's
    classifier and of everything outside the ResNet.

    Raises:
        UserError: names are missing or unexpected, an array has the wrong shape, or a value is not valid.
    """
    prefix = unwrapped.resnet
    inside = [name for name in unwrapped.weights if name.startswith(prefix) and name not in unwrapped.outside]
    resnet = {name.removeprefix(prefix): unwrapped.weights[name] for name in inside}
    resnet = {name: array for name, array in resnet.items() if not name.startswith(CLASSIFIER)}
    backbone = _backbone(resnet, alone=True)
    stem = resnet["conv1.weight"]
    if stem.ndim != 4:
        raise UserError(f"conv1.weight has shape {stem.shape}, which no convolution has: give another file.")
    config = _config(backbone, stem.shape, hidden_dim=model.hidden_dim, projection_dim=model.projection_dim)
    template = encoder_template(config)
    heads = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template) if key is None else init_encoder(config, key)
    fresh = to_torch(heads, config, 0)
    own = {name.removeprefix(RESNET): array.shape for name, array in fresh.items() if name.startswith(RESNET)}
    _check_arrays(resnet, {name: shape for name, shape in own.items() if not name.endswith(COUNTERS)})
    dropped = {name for name in unwrapped.weights if name not in inside or name.startswith(f"{prefix}{CLASSIFIER}")}
    return fresh | {f"{RESNET}{name}": array for name, array in resnet.items()}, sorted(dropped)


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
def _expected_names(backbone: BackboneName, alone: bool) -> frozenset[str]:
    """The names of an encoder, or of its ResNet alone."""
    config = ModelConfig(backbone=backbone, width=1, hidden_dim=1, projection_dim=2, precision="float32")
    names = [*_names(encoder_template(config), config), *FOLDED]
    return (
        frozenset(name.removeprefix(RESNET) for name in names if name.startswith(RESNET)) if alone else frozenset(names)
    )


def _backbone(weights: Weights, alone: bool) -> BackboneName:
    """The backbone of an encoder with these arrays, or of a ResNet alone."""
    expected = {backbone: _expected_names(backbone, alone) for backbone in BACKBONES}
    names = {name for name in weights if not name.endswith(COUNTERS)}
    backbone = min(expected, key=lambda backbone: len(expected[backbone] ^ names))
    missing, unexpected = expected[backbone] - names, names - expected[backbone]
    if missing or unexpected:
        what = f"a {backbone} alone" if alone else f"an EMP-SSL encoder with a {backbone}"
        remedy = "give a ResNet with torchvision's names"
        if not alone:
            remedy = "give a file written by `export` or by the authors' code, or add --fresh-heads to a ResNet alone"
        raise UserError(
            f"These are not the arrays of {what}: {listed('missing', missing)}; {listed('unexpected', unexpected)}; "
            f"{remedy}."
        )
    return backbone


def _config(backbone: BackboneName, stem_shape: tuple[int, ...], hidden_dim: int, projection_dim: int) -> ModelConfig:
    stem: Literal["imagenet", "cifar"] = "imagenet" if stem_shape[-1] == 7 else "cifar"
    try:
        return ModelConfig(backbone, stem, stem_shape[0], hidden_dim, projection_dim, precision="float32")
    except UserError as error:
        raise UserError(f"The file's encoder has a size that is not supported: {error}") from error


def _check_arrays(weights: Weights, shapes: dict[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise UserError(f"{name} has shape {weights[name].shape} instead of {shape}: give another file.")
        if weights[name].dtype.kind != "f":
            kind = weights[name].dtype
            raise UserError(f"{name} has type {kind} instead of floating point: give a file that is not quantised.")
        if not np.isfinite(weights[name]).all():
            raise UserError(f"{name} is not finite: give a file from before training went wrong.")
        if name.endswith("running_var") and (weights[name] < 0).any():
            raise UserError(f"{name} has negative variances: give another file.")


def listed(what: str, names: Iterable[str]) -> str:
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
