"""A run as one page to look at: RUN/report.html, which needs nothing else and opens no connection.

`python -m empssl_jax.report RUN` writes it anew; train.py and eval.py write it at their end.

A run is read (run.py), numbers are made of it (findings.py) and put into words (remarks.py), curves (charts.py) and
pictures (pictures.py); the templates lay them out (page.py). The pictures go to TensorBoard too (tensorboard.py).
"""

import sys
import warnings
from pathlib import Path

from empssl_jax.config import Config
from empssl_jax.config.errors import one_line
from empssl_jax.data.datasets import ImageDataset
from empssl_jax.report.findings import examine
from empssl_jax.report.page import render
from empssl_jax.report.pictures import training_patches
from empssl_jax.report.run import read_run
from empssl_jax.report.tensorboard import write_pictures
from empssl_jax.run_folder.workdir import replacing
from empssl_jax.runtime.distributed import is_first_process

REPORT_FILE = "report.html"


def write_report(workdir: Path, config: Config, datasets: dict[str, ImageDataset] | None) -> Path:
    """Writes the page of a run, and its pictures for TensorBoard; returns the page's path.

    Args:
        workdir: folder of the run; whatever it does not hold yet is left out of the page.
        config: how the run was trained and measured.
        datasets: "train", "bank" and "test", as the run uses them; None leaves the pictures out.
    """
    run = read_run(workdir, config, datasets)
    sheet = training_patches(config, run.datasets["train"]) if run.datasets else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scikit-learn and UMAP, about their own ways
        seed = config.training.seed
        findings = examine(**run.embeddings, config=config.evaluation, seed=seed) if run.embeddings else None
    path = workdir / REPORT_FILE
    with replacing(path) as file:
        file.write(render(run, sheet, findings).encode())
    write_pictures(run, sheet, findings)
    return path


def try_to_report(workdir: Path, config: Config, datasets: dict[str, ImageDataset] | None) -> None:
    """Writes the report in the first process; whatever goes wrong is told in a sentence and harms no run."""
    if not is_first_process():
        return
    try:
        print(f"wrote {write_report(workdir, config, datasets)}")
    except Exception as error:  # the run is done and saved, and must not end as a failure because of a picture
        reason = f"{type(error).__name__}: {one_line(error)}"
        print(
            f"warning: {workdir / REPORT_FILE} could not be written ({reason}): the run is complete, and `python -m "
            f"empssl_jax.report {workdir}` tries again.",
            file=sys.stderr,
        )
