"""The config of a training run: from a Python file, then from options on the command line."""

import runpy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import tyro

from empssl_jax.config.checked_fields import Checked, path_field
from empssl_jax.config.errors import UserError, one_line
from empssl_jax.config.run_config import Config

Options = TypeVar("Options")

PACKAGE = Path(__file__).parents[1]
SHIPPED = (PACKAGE / "configs", PACKAGE.parent / "configs")  # in an installed package; in a checkout
DEFAULT = "configs/cifar10.py"


def read_config_file(name: str) -> Config:
    """Runs a Python file and returns its variable `config`.

    Args:
        name: a path, or one of the configs that come with the package: configs/digits.py, or digits for short.

    Raises:
        UserError: the file cannot be read or run, or defines no such Config.
    """
    path = _find(name)
    if not path.is_file():
        names = ", ".join(sorted({file.stem for folder in SHIPPED for file in folder.glob("[a-z]*.py")}))
        raise UserError(f"--config {name} cannot be used (there is no such file): give a file, or one of {names}.")
    try:
        config = runpy.run_path(str(path)).get("config")
    except UserError as error:
        raise UserError(f"--config {name} has a wrong value: {error}") from error
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"--config {name} cannot be used ({reason}): see {DEFAULT}.") from error
    if not isinstance(config, Config):
        raise UserError(f"--config {name} defines no `config = Config(...)`: see {DEFAULT}.")
    return config


def _find(name: str) -> Path:
    path = Path(name)
    if path.is_file() or path.parent not in (Path(), Path("configs")):
        return path
    return _shipped(path)


def _shipped(path: Path) -> Path:
    """The config of that name that comes with the package; the path itself if there is none."""
    shipped = [folder / f"{path.stem}.py" for folder in SHIPPED]
    return next((file for file in shipped if file.is_file()), path)


@dataclass(frozen=True)
class _ConfigOption(Checked):
    config: str | None = path_field(None)


def parse_train_options(arguments: Sequence[str], prog: str | None = None) -> Config:
    """The config of `train [--config FILE] [options]`: the file's values, overridden by the options."""
    chosen, rest = first_options(_ConfigOption, arguments)
    # Without the option, no file of the current folder runs, even if it has the default's name.
    file = str(_shipped(Path(DEFAULT))) if chosen.config is None else chosen.config
    description = (
        "Trains an EMP-SSL encoder, embeds the images, and measures kNN and the effective rank. The options of the "
        "linear classifier and of logistic regression are saved with the run for empssl eval.\n\n"
        "The defaults below are those of the experiment that --config FILE names: one of configs/ or a file of yours "
        f"(now {chosen.config or DEFAULT}). The same command resumes an interrupted run.\n\n"
        "Example: empssl train --dataset folder:photos --image-size 64 --workdir runs/photos"
    )
    return tyro.cli(Config, args=rest, default=read_config_file(file), description=description, prog=prog)


def first_options(kind: type[Options], arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """The options that decide the defaults of the others, and the remaining arguments."""
    return tyro.cli(kind, args=list(arguments), return_unknown_args=True, add_help=False)
