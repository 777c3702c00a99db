"""The command line: files of configs, options, and what a user sees of an error."""

import contextlib
import logging
import re
import runpy
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import tyro

from empssl_jax.config import Config
from empssl_jax.config.errors import UserError, one_line
from empssl_jax.run_folder import saved_config

Options = TypeVar("Options")


def load_config(path: str | Path) -> Config:
    """Runs a Python file and returns what it calls `config`.

    Raises UserError if the file cannot be read or run, or has no such Config.
    """
    try:
        config = runpy.run_path(str(path)).get("config")
    except UserError as error:
        raise UserError(f"--config {path} has a wrong value: {error}") from error
    except (Exception, SystemExit) as error:  # whatever a file of the user's raises
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"--config {path} cannot be used ({reason}): see configs/cifar10.py.") from error
    if not isinstance(config, Config):
        raise UserError(f"--config {path} defines no `config = Config(...)`: see configs/cifar10.py.")
    return config


@dataclass(frozen=True)
class _ConfigOption:
    config: str


def first_options(kind: type[Options], arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """The options that decide what the defaults of the others are, and the arguments that are left."""
    return tyro.cli(kind, args=list(arguments), return_unknown_args=True, add_help=False)


def run_defaults(workdir: str, arguments: Sequence[str]) -> Config:
    """The config of a run, for what the arguments do not say; if they ask for help, there need not be a run.

    Raises:
        UserError: the folder is not that of a run.
    """
    try:
        return saved_config.load_config(Path(workdir))
    except UserError:
        if asks_for_help(arguments):
            return Config()
        raise


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether nothing is to be done but to list the options."""
    return bool({"-h", "--help"} & set(arguments))


def parse_train_options(arguments: Sequence[str], default_config: Path) -> Config:
    """The config of `train.py [--config FILE] [options]`: the file's values, then those of the options."""
    chosen, rest = tyro.cli(
        _ConfigOption,
        args=list(arguments),
        default=_ConfigOption(str(default_config)),
        return_unknown_args=True,
        add_help=False,
    )
    description = (
        "Trains an EMP-SSL encoder and measures its embeddings.\n\n--config FILE chooses an experiment of configs/ "
        f"(now {chosen.config}), whose values are the defaults below. The same command again resumes the run."
    )
    return tyro.cli(Config, args=rest, default=load_config(chosen.config), description=description)


@contextlib.contextmanager
def user_errors_exit() -> Iterator[None]:
    """Turns what the user can mend into a sentence and an exit code, and Ctrl-C into exit code 130.

    That is a UserError, a failure of the file system, and too little memory.
    """
    _silence_background_threads()
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        print(f"error: {one_line(error)}: free the disk, mend the file or give another folder.", file=sys.stderr)
        raise SystemExit(UserError.exit_code) from None
    except (MemoryError, RuntimeError) as error:
        # XLA's errors have no class of their own for this; a GPU's and a CPU's read differently.
        if not (isinstance(error, MemoryError) or re.search("RESOURCE_EXHAUSTED|Out of memory", str(error))):
            raise
        remedy = "lower --batch-size, --embedding-batch-size, --train-patches or --width, or give --remat"
        print(f"error: out of memory ({one_line(error)}): {remedy}.", file=sys.stderr)
        raise SystemExit(UserError.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _silence_background_threads() -> None:
    """Keeps traces of Orbax's and TensorStore's threads from the terminal: what concerns a run is raised in it too."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")
