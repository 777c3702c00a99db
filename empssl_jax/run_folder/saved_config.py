"""A run's config, and the size, number and fingerprints of its images, as JSON files in its folder."""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import safetensors

from empssl_jax.config import Config
from empssl_jax.config.errors import UserError, one_line
from empssl_jax.config.pretrained import pretrained_file
from empssl_jax.runtime.atomic_write import write_text

CONFIG_FILE = "config.json"
IMAGES_FILE = "images.json"
DEFAULT_IMAGE_SIZE = 32  # of runs that do not record it
MAX_IMAGE_SIZE = 2**16


def to_json(config: Config, leave_out: Collection[str] = ("distributed",)) -> str:
    """The config as JSON, one object a group, by default without `distributed`: processes are not part of the run."""
    groups = {name: values for name, values in dataclasses.asdict(config).items() if name not in leave_out}
    return json.dumps(groups, indent=2) + "\n"


def from_json(text: str | bytes, source: object, remedy: str = "train again") -> Config:
    """Parses the output of `to_json`; raises UserError, naming `source` and the remedy, for any other text."""
    try:
        groups = json.loads(text)
        types: dict[str, Any] = {field.name: field.default_factory for field in dataclasses.fields(Config)}
        return Config(**{name: types[name](**_tuples(values)) for name, values in groups.items()})
    except UserError as error:
        raise UserError(f"{source} has a wrong value: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = one_line(error)
        raise UserError(f"{source} is not a config of this version of empssl_jax ({reason}): {remedy}.") from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """The values with tuples instead of lists, since JSON has only lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def save_config(workdir: Path, config: Config) -> None:
    """Writes the config of a run into its folder."""
    write_text(workdir / CONFIG_FILE, to_json(config))


def load_config(workdir: Path, argument: str = "--workdir") -> Config:
    """The config of a run.

    Args:
        workdir: folder of the run.
        argument: what named the folder, for the error message.

    Raises:
        UserError: the folder holds no valid config.
    """
    path = workdir / CONFIG_FILE
    check_not_pretrained(workdir, argument)
    if workdir.is_file():
        command = f"`empssl import {workdir} --workdir RUN` makes one"
        raise UserError(f"{argument} {workdir} is a file, not the folder of a run: if it holds weights, {command}.")
    if not path.is_file():
        raise UserError(f"{argument} {workdir} has no {CONFIG_FILE}: give the folder of a run.")
    return from_json(path.read_bytes(), path)


def check_not_pretrained(workdir: str | Path, argument: str) -> None:
    """Raises UserError if the value of `argument`, which needs a run, is the name of a pretrained encoder."""
    if pretrained_file(workdir):
        command = f"`empssl import {workdir} --fresh-heads --workdir RUN` makes one"
        raise UserError(f"{argument} {workdir} is an encoder that comes with the package, not a run: {command}.")


def pretrained_config(file: Path) -> Config:
    """The config of an encoder that comes with the package."""
    with safetensors.safe_open(file, framework="numpy") as weights:
        return from_json(weights.metadata()["config"], file)


class SavedImages(NamedTuple):
    """What a run's config does not say about its images."""

    size: int  # side of the training images in pixels, which the config may leave to the data set
    fingerprints: dict[str, str]  # see `folder_fingerprints`; empty for other data sets, and if unknown
    num_train: int | None = None  # number of training images; None if unknown, as for imported weights


def save_images(workdir: Path, images: SavedImages) -> None:
    """Writes what is known of a run's images into its folder."""
    write_text(workdir / IMAGES_FILE, json.dumps(images._asdict()))


def load_saved_images(workdir: Path) -> SavedImages:
    """What is known of a run's images; raises UserError if the file is invalid."""
    path = workdir / IMAGES_FILE
    try:
        saved: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {"size": DEFAULT_IMAGE_SIZE}
        size, num_train = saved["size"], saved.get("num_train")
        if type(size) is not int or not 1 <= size <= MAX_IMAGE_SIZE:
            raise ValueError(f"size {size!r}")
        if num_train is not None and (type(num_train) is not int or num_train < 1):
            raise ValueError(f"num_train {num_train!r}")
        return SavedImages(size, dict(saved.get("fingerprints", {})), num_train)
    except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error)}): delete it to use {DEFAULT_IMAGE_SIZE} pixels."
        ) from error
