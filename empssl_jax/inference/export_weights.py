"""Exports trained encoders to files for PyTorch, with metadata that describe them."""

import dataclasses
from pathlib import Path

from empssl_jax.config.command_options import RUN, ExportOptions
from empssl_jax.config.errors import words
from empssl_jax.inference.image_encoder import ImageEncoder, load
from empssl_jax.inference.torch_names import to_torch
from empssl_jax.inference.weight_files import SUFFIXES, Metadata, import_torch, write_weights
from empssl_jax.run_folder.saved_config import load_config, to_json
from empssl_jax.runtime.atomic_write import check_output

FEATURES = {  # by `embedded_layer`, with the names of the file's arrays
    "hidden": "relu(pre_feature(mean of layer4)); patches are averaged, cells concatenated",
    "stages": "means of layer1, layer2, layer3 and layer4; patches are averaged, cells concatenated",
    "stages+hidden": "means of layer1, layer2, layer3 and layer4; patches are averaged, cells concatenated; "
    "then relu(pre_feature(mean of layer4)), averaged over patches and cells",
}


def export_weights(options: ExportOptions) -> Path:
    """Writes the file atomically and returns its path.

    Raises:
        UserError: the run or the checkpoint does not exist or is damaged, the output is a folder or a device, or
            PyTorch is needed but not installed.
        OSError: the file cannot be written.
    """
    if options.format == "torch":
        import_torch()  # raises UserError before the work begins
    load_config(Path(options.run), RUN)  # likewise
    path = Path(options.output or Path(options.run) / f"weights{SUFFIXES[options.format]}")
    check_output(path)  # likewise
    encoder = load(options.run, options.step)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_encoder(path, encoder, options.format)
    print(f"exported step {encoder.step} of {options.run} to {path}")
    return path


def write_encoder(path: Path, encoder: ImageEncoder, kind: str) -> None:
    """Writes an encoder and its metadata to a file of a kind in SUFFIXES, atomically."""
    write_weights(path, to_torch(encoder.state, encoder.config.model, encoder.step), torch_metadata(encoder), kind)


def torch_metadata(encoder: ImageEncoder) -> Metadata:
    """Describes the encoder for users of a file for PyTorch: `metadata_of`, its input, and what it embeds."""
    config, metadata = encoder.config, metadata_of(encoder)
    size, mean, std = config.patches.patch_size, metadata["input_mean"], metadata["input_std"]
    return metadata | {
        "input": f"RGB patches (N, 3, {size}, {size}), (pixels / 255 - mean) / std, mean {mean}, std {std}",
        "features": FEATURES[config.evaluation.embedded_layer],
    }


def metadata_of(encoder: ImageEncoder) -> Metadata:
    """Describes the encoder for users of any file, as strings; also contains the config as JSON, without folders."""
    config = encoder.config
    model = {
        name: " ".join(words(value)) for name, value in dataclasses.asdict(config.model).items() if name != "precision"
    }
    return model | {
        "step": str(encoder.step),
        "image_size": str(encoder.image_size),
        "embedding": config.evaluation.embedding.embeddings,
        "config": to_json(config, leave_out=("distributed", "run")),
    }
