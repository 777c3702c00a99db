"""A run's config, and the size and fingerprints of its images, as JSON files in its folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import safetensors

from empssl_jax.config import Config
from empssl_jax.config.errors import UserError, one_line
from empssl_jax.config.pretrained import pretrained_file
from empssl_jax.runtime.atomic_write import write_text

CONFIG_FILE = "config.json"
IMAGES_FILE = "images.json"
DEFAULT_IMAGE_SIZE = 32  # of runs that do not record it
MAX_IMAGE_SIZE = 2**16


def to_json(config: Config) -> str:
    """The config as JSON, one object a group, without `distributed`: processes are not part of the run."""
    groups = {name: values for name, values in dataclasses.asdict(config).items() if name != "distributed"}
    return json.dumps(groups, indent=2) + "\n"


def from_json(text: str | bytes, source: object) -> Config:
    """Parses the output of `to_json`; raises UserError, naming `source`, for any other text."""
    try:
        groups = json.loads(text)
        types: dict[str, Any] = {field.name: field.default_factory for field in dataclasses.fields(Config)}
        return Config(**{name: types[name](**_tuples(values)) for name, values in groups.items()})
    except UserError as error:
        raise UserError(f"{source} has a wrong value: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = one_line(error)
        raise UserError(f"{source} is not a config of this version of empssl_jax ({reason}): train again.") from error


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


def save_images(workdir: Path, size: int, fingerprints: dict[str, str] | None = None) -> None:
    """Saves what the config does not say about a run's images.

    Args:
        workdir: folder of the run.
        size: side of the training images in pixels, which the config may leave to the data set.
        fingerprints: see `folder_fingerprints`; none for other data sets.
    """
    write_text(workdir / IMAGES_FILE, json.dumps({"size": size, "fingerprints": fingerprints or {}}))


def load_image_size(workdir: Path) -> int:
    """The side of a run's training images in pixels; raises UserError if the file is invalid."""
    return _load_images(workdir)[0]


def load_fingerprints(workdir: Path) -> dict[str, str]:
    """The fingerprints of a run's images by split, empty if unknown; raises UserError if the file is invalid."""
    return _load_images(workdir)[1]


def _load_images(workdir: Path) -> tuple[int, dict[str, str]]:
    """The size and the fingerprints of a run's images."""
    path = workdir / IMAGES_FILE
    try:
        images: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {"size": DEFAULT_IMAGE_SIZE}
        size = images["size"]
        if type(size) is not int or not 1 <= size <= MAX_IMAGE_SIZE:
            raise ValueError(f"size {size!r}")
        return size, dict(images.get("fingerprints", {}))
    except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error)}): delete it to use {DEFAULT_IMAGE_SIZE} pixels."
        ) from error
