"""Measures the seconds of training until kNN (k = 10, cosine similarity) reaches an accuracy, from a run's checkpoints.

    empssl train --config cifar10_best --max-epochs 40 --checkpoint-every 500 --max-to-keep 40 --workdir RUN
    python -m experiments.race --workdir RUN [--accuracy 0.9]

Each checkpoint is measured on the full test set, oldest first, until one reaches the accuracy. The seconds are those of
the training loop: they include compilation, but neither embedding nor kNN. Measurements are kept in RUN/race.jsonl, and
the same command continues after them. Choose the number of epochs before training, because the learning-rate schedule
depends on it.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import tyro

from empssl_jax.data.datasets import load_datasets
from empssl_jax.evaluation.evaluate import measure_knn
from empssl_jax.run_folder.checkpoints import Checkpoints
from empssl_jax.run_folder.saved_config import load_config
from empssl_jax.run_folder.step_files import TIMING_FILE, read_steps
from empssl_jax.runtime.compilation import keep_compiled_programs
from empssl_jax.runtime.devices import device_mesh
from empssl_jax.runtime.user_errors import user_errors_exit
from experiments.records import append_line, checkpoint_embeddings

NUM_NEIGHBOURS = 10


@dataclass(frozen=True)
class Options:
    """The run, and the accuracy to reach."""

    # Folder of a run of train.py that kept its checkpoints.
    workdir: str
    # kNN top-1 accuracy to reach, from 0 to 1.
    accuracy: float = 0.9


def main(options: Options) -> None:
    """Measures checkpoints until one reaches the accuracy, and prints its seconds of training."""
    workdir = Path(options.workdir)
    seconds = {line["step"] + 1: line["seconds"] for line in read_steps(workdir / TIMING_FILE)}
    with Checkpoints(workdir, read_only=True) as store:
        steps = store.steps()
    config = load_config(workdir)
    datasets = load_datasets(config)
    evaluation = dataclasses.replace(config.evaluation, num_neighbours=NUM_NEIGHBOURS)
    results = workdir / "race.jsonl"
    done = {line["step"]: line for line in read_steps(results)}
    for step in steps:
        if step not in done:
            embeddings = checkpoint_embeddings(workdir, evaluation, datasets, step)
            accuracy = measure_knn(embeddings, evaluation, device_mesh())
            done[step] = {"step": step, "seconds": seconds[step]} | accuracy
            append_line(results, done[step])
        print(f"step {step}, {done[step]['seconds']:.0f} s of training: kNN {100 * done[step]['top1']:.2f} %")
        if done[step]["top1"] >= options.accuracy:
            print(f"reached {100 * options.accuracy:.1f} % after {done[step]['seconds']:.0f} s")
            return
    print(f"never reached {100 * options.accuracy:.1f} %")


if __name__ == "__main__":
    with user_errors_exit():
        keep_compiled_programs()
        main(tyro.cli(Options, description=__doc__))
