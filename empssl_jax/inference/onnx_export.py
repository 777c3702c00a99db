"""Exports the whole embedder of a run to an ONNX file, if the package onnx is installed."""

import dataclasses
from pathlib import Path

from empssl_jax.config import EmbeddingConfig
from empssl_jax.config.command_options import ExportOptions
from empssl_jax.config.errors import UserError, install, require
from empssl_jax.inference.export_weights import metadata_of
from empssl_jax.inference.image_encoder import load
from empssl_jax.runtime.atomic_write import atomic_write, check_output


def export_embedder(options: ExportOptions) -> Path:
    """Writes the file atomically and returns its path.

    Raises:
        UserError: crops are random, the package onnx is not installed, the run or the checkpoint does not exist or is
            damaged, the output is a folder or a device, or the encoder is too large.
        OSError: the file cannot be written.
    """
    _check_views(options.embedding)
    try:
        from empssl_jax.inference.onnx_graph import to_onnx
    except ImportError as error:
        raise UserError(f"--format onnx needs the package onnx: {install('onnx')}.") from error
    path = Path(options.output or Path(options.run) / "embedder.onnx")
    check_output(path)
    encoder = load(options.run, options.step, **dataclasses.asdict(options.embedding))
    side = encoder.image_size
    content = to_onnx(encoder, metadata_of(encoder) | {"input": f"RGB images (N, {side}, {side}, 3), uint8"})
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(content)
    print(f"exported step {encoder.step} of {options.run} to {path}, embedding {options.embedding.embeddings}")
    return path


def _check_views(embedding: EmbeddingConfig) -> None:
    remedy = "an ONNX file cannot draw JAX's random numbers, so add --valid-crops grid --valid-patches 16, for example"
    require(embedding.valid_crops != "random", "valid_crops", embedding.valid_crops, remedy)
    embedding.require_patches()
