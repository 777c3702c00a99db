"""Exports trained encoders to files for PyTorch, and imports such files as runs.

A .safetensors file needs only this package; a .pt file needs PyTorch. Both contain a state dictionary (see
torch_names.py) and metadata: strings that describe how to build the encoder and what its input is.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from empssl_jax.config import Config
from empssl_jax.config.command_options import RUN, ExportOptions, ImportOptions
from empssl_jax.config.config_files import read_config_file
from empssl_jax.config.errors import UserError, one_line, require
from empssl_jax.inference.image_encoder import ImageEncoder, load
from empssl_jax.inference.torch_names import TorchWeights, from_torch, to_torch
from empssl_jax.method.encoder import default_precision, init_encoder
from empssl_jax.method.random_keys import parameters_key
from empssl_jax.method.train_step import learning_rate_schedule, make_optimizer
from empssl_jax.run_folder.checkpoints import Checkpoints
from empssl_jax.run_folder.saved_config import (
    DEFAULT_IMAGE_SIZE,
    from_json,
    load_config,
    save_config,
    save_images,
    to_json,
)
from empssl_jax.run_folder.workdir import locked, storage_errors
from empssl_jax.runtime.atomic_write import atomic_write

SUFFIXES = {"safetensors": ".safetensors", "torch": ".pt"}
Metadata = dict[str, str]


def export_weights(options: ExportOptions) -> Path:
    """Writes the file atomically and returns its path.

    Raises:
        UserError: the run or the checkpoint does not exist or is damaged, or PyTorch is needed but not installed.
        OSError: the file cannot be written.
    """
    if options.format == "torch":
        _torch()  # raises UserError before the work begins
    load_config(Path(options.run), RUN)  # likewise
    encoder = load(options.run, options.step)
    weights = to_torch(encoder.state, encoder.config.model, encoder.step)
    path = Path(options.output or Path(options.run) / f"weights{SUFFIXES[options.format]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, weights, _metadata(encoder), options.format)
    print(f"exported step {encoder.step} of {options.run} to {path}")
    return path


def import_weights(options: ImportOptions) -> None:
    """Creates the folder of a run, with a config and one checkpoint at step 0.

    Raises:
        UserError: the file cannot be read or does not hold an encoder, or the folder already holds a run.
        StorageError: the folder cannot be written to.
    """
    weights, metadata = _read(Path(options.file))
    config, workdir = _base_config(options, metadata), Path(options.workdir)
    model, encoder = from_torch(_with_fresh_heads(weights, config) if options.fresh_heads else weights)
    precision = default_precision() if config.model.precision == "auto" else config.model.precision
    model = dataclasses.replace(model, precision=precision)
    config = dataclasses.replace(config, model=model, run=dataclasses.replace(config.run, workdir=options.workdir))
    optimizer = make_optimizer(config.training, learning_rate_schedule(config.training, 1))
    encoder = jax.tree.map(jax.numpy.asarray, encoder)
    with locked(workdir), storage_errors(workdir), Checkpoints(workdir) as checkpoints:
        held = checkpoints.latest_step()
        require(held is None, "workdir", options.workdir, "that folder holds a run, so give another one")
        save_config(workdir, config)
        save_images(workdir, int(metadata.get("image_size", config.data.image_size or DEFAULT_IMAGE_SIZE)))
        checkpoints.save(0, encoder, optimizer.init(encoder.params), loss=math.inf)
        checkpoints.wait()
    sizes = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(model).items())
    print(f"imported {options.file} into {options.workdir} ({sizes})")


def _base_config(options: ImportOptions, metadata: Metadata) -> Config:
    """The config file's config, else the one in the metadata, else the defaults."""
    if options.config is not None:
        return read_config_file(options.config)
    return from_json(metadata["config"], options.file) if "config" in metadata else Config()


def _with_fresh_heads(weights: TorchWeights, config: Config) -> TorchWeights:
    """Adds freshly initialised heads to the arrays of a ResNet; drops its classifier."""
    model = dataclasses.replace(config.model, precision="float32")
    fresh = to_torch(init_encoder(model, parameters_key(config.training.seed)), model, 0)
    heads = {name: array for name, array in fresh.items() if not name.startswith("backbone.")}
    return heads | {f"backbone.{name}": array for name, array in weights.items() if not name.startswith("fc.")}


def _metadata(encoder: ImageEncoder) -> Metadata:
    """Describes the encoder for users of the file, as strings; also contains the run's config as JSON."""
    config = encoder.config
    model = {name: str(value) for name, value in dataclasses.asdict(config.model).items() if name != "precision"}
    size = config.patches.patch_size
    return model | {
        "step": str(encoder.step),
        "image_size": str(encoder.image_size),
        "input": f"RGB patches (N, 3, {size}, {size}), pixels / 127.5 - 1",
        "embedding": "relu(pre_feature(backbone(patch))), for an image the mean over its patches",
        "config": to_json(config),
    }


def _write(path: Path, weights: TorchWeights, metadata: Metadata, kind: str) -> None:
    with atomic_write(path) as file:
        if kind == "safetensors":
            file.write(safetensors.numpy.save(weights, metadata))
        else:
            torch = _torch()
            tensors = {name: torch.tensor(array) for name, array in weights.items()}
            torch.save({"state_dict": tensors, "metadata": metadata}, file)


def _read(path: Path) -> tuple[TorchWeights, Metadata]:
    """Reads the arrays of a file, as float32, and its metadata if it has any. Executes no code that the file holds."""
    if not path.is_file():
        raise UserError(f"There is no file {path}: give a file written by `export` or by the authors' code.")
    is_torch = path.suffix != SUFFIXES["safetensors"]
    torch: Any = _torch() if is_torch else None
    try:
        if not is_torch:
            with safetensors.safe_open(path, framework="numpy") as file:
                names = file.keys()
                return {name: file.get_tensor(name).astype(np.float32) for name in names}, file.metadata() or {}
        content = torch.load(path, map_location="cpu", weights_only=True)
        tensors = content.get("state_dict", content)
        return {name: tensor.float().numpy() for name, tensor in tensors.items()}, content.get("metadata", {})
    except Exception as error:  # the libraries raise various exceptions on other files
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {one_line(error)}): give a .safetensors file, or a .pt or "
            ".pth file that contains a state dictionary and nothing else."
        ) from error


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            'Files for torch.load need PyTorch: pip install "empssl_jax[torch]", or use a .safetensors file.'
        ) from error
    return torch
