"""Imports files of weights as runs: those of `export`, of the authors' code, and ResNets without heads.

The metadata of a file may describe how to build the encoder and what its input is.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax

from empssl_jax.config import Config, ModelConfig, RunConfig
from empssl_jax.config.command_options import ImportOptions
from empssl_jax.config.config_files import read_config_file
from empssl_jax.config.errors import UserError, one_line, require, words
from empssl_jax.config.pretrained import pretrained_file
from empssl_jax.inference.torch_names import from_torch, listed, with_fresh_heads
from empssl_jax.inference.weight_files import Metadata, read_weights
from empssl_jax.inference.wrappers import unwrap
from empssl_jax.method.encoder import EncoderState, with_known_precision
from empssl_jax.method.hyperparameters import Hyperparameters
from empssl_jax.method.random_keys import parameters_key
from empssl_jax.method.train_step import make_optimizer
from empssl_jax.run_folder.checkpoints import Checkpoints
from empssl_jax.run_folder.results import drop_results
from empssl_jax.run_folder.saved_config import (
    DEFAULT_IMAGE_SIZE,
    MAX_IMAGE_SIZE,
    SavedImages,
    from_json,
    save_config,
    save_images,
)
from empssl_jax.run_folder.step_files import METRICS_FILE, PROBE_FILE, TIMING_FILE, drop_steps_from
from empssl_jax.run_folder.workdir import locked, storage_errors

IMAGENET = {"input_mean": (0.485, 0.456, 0.406), "input_std": (0.229, 0.224, 0.225)}  # of torchvision's weights


def import_weights(options: ImportOptions) -> None:
    """Creates the folder of a run, with a config and one checkpoint at step 0, and prints what it found and assumed.

    Raises:
        UserError: the file cannot be read, does not hold an encoder or has wrong metadata, or the folder already holds
            a run; nothing has been written.
        StorageError: the folder cannot be written to.
    """
    imported = read_run(options)
    _write_run(imported)
    print(f"imported {options.file} into {options.workdir} ({imported.notes[0]})", *imported.notes[1:], sep="\n")


class ImportedRun(NamedTuple):
    """A run made from a file."""

    config: Config
    encoder: EncoderState
    image_size: int  # side in pixels
    notes: list[str]  # what was found and assumed, the sizes first


def read_run(options: ImportOptions, draw_heads: bool = True) -> ImportedRun:
    """Reads a file of weights, or the pretrained encoder of that name, and checks all that is in it.

    Nothing is written.

    Args:
        options: the file, and what to make of it.
        draw_heads: whether fresh heads are drawn at random, to be trained; else they are zeros, which takes no time.

    Raises:
        UserError: the file cannot be read, does not hold an encoder or has wrong metadata.
    """
    arrays, metadata = read_weights(pretrained_file(options.file) or Path(options.file))
    config, unwrapped = _base_config(options, metadata), unwrap(arrays)
    image_size = _image_size(options, metadata, config)
    normalisation, source = _normalisation(options, metadata, has_heads="pre_feature.0.weight" in unwrapped.weights)
    weights, notes = unwrapped.weights, [f"input_mean and input_std are {source}"]
    if unwrapped.removed:
        notes.append(f"prefixes removed from the names: {', '.join(unwrapped.removed)}")
    if options.fresh_heads:
        key = parameters_key(config.training.seed) if draw_heads else None
        weights, dropped = with_fresh_heads(unwrapped, config.model, key)
        notes.append(f"arrays without a place in the encoder: {listed('dropped', dropped)}")
    model, encoder = from_torch(weights)
    precision = with_known_precision(config.model).precision
    model = dataclasses.replace(model, precision=precision, **normalisation)
    sizes = ", ".join(f"{name} {' '.join(words(value))}" for name, value in dataclasses.asdict(model).items())
    config = dataclasses.replace(config, model=model, run=dataclasses.replace(config.run, workdir=options.workdir))
    return ImportedRun(config, encoder, image_size, [sizes, *notes])


def _write_run(imported: ImportedRun) -> None:
    config, encoder, image_size, _ = imported
    workdir = Path(config.run.workdir)
    optimizer = make_optimizer(Hyperparameters.of(config.training, steps_per_epoch=1))
    encoder = jax.tree.map(jax.numpy.asarray, encoder)
    with locked(workdir), storage_errors(workdir), Checkpoints(workdir) as checkpoints:
        held = checkpoints.latest_step()
        require(held is None, "workdir", config.run.workdir, "that folder holds a run, so give another one")
        drop_results(workdir, lambda result: True, "results of a run that left no checkpoint")
        for name in (METRICS_FILE, PROBE_FILE, TIMING_FILE):
            drop_steps_from(workdir / name, 0)
        save_config(workdir, config)
        save_images(workdir, SavedImages(image_size, {}))
        checkpoints.save(0, encoder, optimizer.init(encoder.params), loss=math.inf)
        checkpoints.wait()


def _base_config(options: ImportOptions, metadata: Metadata) -> Config:
    """The config file's config, else the one in the metadata, else the defaults."""
    if options.config is not None:
        return read_config_file(options.config)
    if "config" not in metadata:
        return Config()
    config = from_json(metadata["config"], f"`config` in {options.file}", remedy="give --config FILE.py")
    return dataclasses.replace(config, run=RunConfig())  # the exporter's folders may not exist here


def _image_size(options: ImportOptions, metadata: Metadata, config: Config) -> int:
    """The side of the images in pixels: the one in the metadata, else the config's, else the default."""
    if "image_size" not in metadata:
        return config.data.image_size or DEFAULT_IMAGE_SIZE
    text = metadata["image_size"]
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= MAX_IMAGE_SIZE):
        raise UserError(
            f"`image_size` in {options.file} is {one_line(text)}: give a file in which it is a whole number from 1 to "
            f"{MAX_IMAGE_SIZE}, or is missing."
        )
    return int(text)


def _normalisation(options: ImportOptions, metadata: Metadata, has_heads: bool) -> tuple[dict[str, Any], str]:
    """The `input_mean` and `input_std` that the weights were trained with, and where they come from, in words."""
    given = {name: getattr(options, name) for name in IMAGENET}
    if None not in given.values():
        return given, "as given"
    for name, value in given.items():
        require(value is None, name, value, "give --input-mean and --input-std together")
    if metadata.keys() & IMAGENET:
        found: dict[str, Any] = {name: _channels(metadata.get(name, "")) for name in IMAGENET}
        try:
            ModelConfig(**found)
        except UserError as error:
            raise UserError(f"The metadata of {options.file} have a wrong value: {error}") from error
        return found, "those in the file"
    if has_heads:
        return {}, "those of the authors' code (--input-mean and --input-std give others)"
    return IMAGENET, "those of torchvision's ImageNet weights (--input-mean and --input-std give others)"


def _channels(text: str) -> tuple[float | str, ...]:
    """The numbers in a text, or the text itself, which ModelConfig refuses."""
    try:
        return tuple(map(float, text.split()))
    except ValueError:
        return (text,)
