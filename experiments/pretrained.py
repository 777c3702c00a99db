"""Writes the ResNet of a run, without heads, as an encoder that comes with the package.

    python -m experiments.pretrained RUN NAME

Kernels are float16, which halves the file; BatchNorm's arrays are float32. Images are embedded as
configs/cifar10_cpu.py says.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import tyro

from empssl_jax.config import RunConfig
from empssl_jax.config.config_files import read_config_file
from empssl_jax.config.pretrained import FOLDER
from empssl_jax.inference.export_weights import torch_metadata
from empssl_jax.inference.image_encoder import load
from empssl_jax.inference.torch_names import COUNTER, RESNET, to_torch
from empssl_jax.inference.weight_files import write_weights
from empssl_jax.runtime.user_errors import user_errors_exit


@dataclass(frozen=True)
class Options:
    """The run and the encoder's name."""

    run: tyro.conf.Positional[str]
    name: tyro.conf.Positional[str]


def main(options: Options) -> None:
    """Writes empssl_jax/pretrained/NAME.safetensors."""
    encoder = load(options.run)
    weights = {
        name.removeprefix(RESNET): array.astype(np.float16) if array.ndim == 4 else array
        for name, array in to_torch(encoder.state, encoder.config.model, encoder.step).items()
        if name.startswith(RESNET) and not name.endswith(COUNTER)
    }
    encoder.config = dataclasses.replace(
        encoder.config,
        model=dataclasses.replace(encoder.config.model, precision="auto"),
        evaluation=read_config_file("cifar10_cpu").evaluation,
        run=RunConfig(workdir=f"runs/{options.name}"),
    )
    write_weights(FOLDER / f"{options.name}.safetensors", weights, torch_metadata(encoder), "safetensors")


if __name__ == "__main__":
    with user_errors_exit():
        main(tyro.cli(Options, description=__doc__))
