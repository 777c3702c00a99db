"""Writes the report of a run: python -m empssl_jax.report RUN [--data-dir FOLDER]."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from empssl_jax.command_line import user_errors_exit
from empssl_jax.config.errors import UserError
from empssl_jax.evaluation.evaluate import Datasets, load_datasets
from empssl_jax.report import write_report
from empssl_jax.run_folder.saved_config import load_config


@dataclass(frozen=True)
class Options:
    """Writes RUN/report.html, a page of figures and explanations."""

    run: tyro.conf.Positional[str]
    """Folder of a run of train.py."""
    data_dir: str | None = None
    """Folder of prepared TFDS data sets; by default the run's, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""


def main(options: Options) -> None:
    """Writes the report; without the images, and saying so, where the data set cannot be had."""
    folder = Path(options.run)
    config = load_config(folder)
    if options.data_dir is not None:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, data_dir=options.data_dir))
    datasets: Datasets | None = None
    try:
        datasets = load_datasets(config)
    except UserError as error:
        print(f"warning: the report has no pictures, since the images cannot be had: {error}", file=sys.stderr)
    print(f"wrote {write_report(folder, config, datasets)}")


if __name__ == "__main__":
    with user_errors_exit():
        main(tyro.cli(Options))
