"""Exports trained encoders to files for PyTorch, with metadata that describe them."""

import dataclasses
from pathlib import Path

from empssl_jax.config.command_options import RUN, ExportOptions
from empssl_jax.config.errors import words
from empssl_jax.inference.image_encoder import ImageEncoder, load
from empssl_jax.inference.torch_names import to_torch
from empssl_jax.inference.weight_files import SUFFIXES, Metadata, import_torch, write_weights
from empssl_jax.run_folder.saved_config import load_config, to_json


def export_weights(options: ExportOptions) -> Path:
    """Writes the file atomically and returns its path.

    Raises:
        UserError: the run or the checkpoint does not exist or is damaged, or PyTorch is needed but not installed.
        OSError: the file cannot be written.
    """
    if options.format == "torch":
        import_torch()  # raises UserError before the work begins
    load_config(Path(options.run), RUN)  # likewise
    encoder = load(options.run, options.step)
    path = Path(options.output or Path(options.run) / f"weights{SUFFIXES[options.format]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_encoder(path, encoder, options.format)
    print(f"exported step {encoder.step} of {options.run} to {path}")
    return path


def write_encoder(path: Path, encoder: ImageEncoder, kind: str) -> None:
    """Writes an encoder and its metadata to a file of a kind in SUFFIXES, atomically."""
    write_weights(path, to_torch(encoder.state, encoder.config.model, encoder.step), metadata_of(encoder), kind)


def metadata_of(encoder: ImageEncoder) -> Metadata:
    """Describes the encoder for users of the file, as strings; also contains the run's config as JSON."""
    config = encoder.config
    model = {
        name: " ".join(words(value)) for name, value in dataclasses.asdict(config.model).items() if name != "precision"
    }
    size = config.patches.patch_size
    mean, std = model["input_mean"], model["input_std"]
    return model | {
        "step": str(encoder.step),
        "image_size": str(encoder.image_size),
        "input": f"RGB patches (N, 3, {size}, {size}), (pixels / 255 - mean) / std, mean {mean}, std {std}",
        "embedding": "relu(pre_feature(backbone(patch))), for an image the mean over its patches",
        "config": to_json(config),
    }
