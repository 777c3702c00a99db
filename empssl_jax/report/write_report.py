"""Writes a run's report."""

import dataclasses
import sys
import warnings
from pathlib import Path

from empssl_jax.config import Config
from empssl_jax.config.command_options import RUN, ReportOptions
from empssl_jax.config.errors import UserError, one_line
from empssl_jax.data.datasets import Datasets, load_datasets_for_pictures
from empssl_jax.evaluation.effective_rank import spectrum
from empssl_jax.evaluation.measured_images import at_place
from empssl_jax.report.findings import examine
from empssl_jax.report.page import render
from empssl_jax.report.pictures import training_patches
from empssl_jax.report.run import read_run
from empssl_jax.report.tensorboard import write_pictures
from empssl_jax.run_folder.saved_config import load_config
from empssl_jax.runtime.atomic_write import write_text
from empssl_jax.runtime.distributed import is_first_process

REPORT_FILE = "report.html"


def write_report(workdir: Path, config: Config, datasets: Datasets | None) -> Path:
    """Writes the page of a run, and its pictures for TensorBoard; returns the path of the page.

    Args:
        workdir: folder of the run; what it does not contain yet is left out of the page.
        config: the config that the run was trained and measured with.
        datasets: the run's images; None leaves the pictures out.
    """
    run = read_run(workdir, config, datasets)
    sheet = training_patches(config, run.datasets.train) if run.datasets else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn and UMAP warn about their own internals
        seed = config.training.seed
        everything = run.all_embeddings if run.embeddings else None
        findings = examine(everything, config.evaluation, seed) if everything else None
    directions = spectrum(run.all_embeddings.test.embeddings) if run.all_embeddings else None
    path = workdir / REPORT_FILE
    write_text(path, render(run, sheet, findings, directions))
    write_pictures(run, sheet, findings)
    return path


def try_to_report(workdir: Path, config: Config, datasets: Datasets | None) -> None:
    """Writes the report, in the first process only. If this fails, prints a warning; the run still succeeds."""
    if not is_first_process():
        return
    try:
        path = write_report(workdir, config, datasets)
    except Exception as error:  # the run is complete and saved, so a failing report must not make it fail
        reason = f"{type(error).__name__}: {one_line(error)}"
        print(
            f"warning: {workdir / REPORT_FILE} could not be written ({reason}): the run is complete, and `empssl "
            f"report {workdir}` tries again.",
            file=sys.stderr,
        )
    else:
        print(f"wrote {path}")


def report_run(options: ReportOptions) -> None:
    """Writes the report of a run. If the data set is not available, prints a warning and leaves the pictures out.

    Raises:
        UserError: there is no such run, its files are damaged, or --dataset names other images than the run's.
    """
    folder = Path(options.run)
    config = load_config(folder, RUN)
    if options.data_dir is not None:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, data_dir=options.data_dir))
    if options.dataset is not None:
        data = at_place(config.data, options.dataset, folder)
        if data is None:
            raise UserError(f"--dataset {options.dataset!r} holds other images than {folder} has: give the run's own.")
        config = dataclasses.replace(config, data=data)
    print(f"wrote {write_report(folder, config, load_datasets_for_pictures(config))}")
