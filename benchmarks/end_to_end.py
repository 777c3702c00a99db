"""Times one epoch of CIFAR-10, embeddings, kNN and the linear classifier, from the start of Python to the results.

    python -m benchmarks.end_to_end ours --workdir RUN [options of train.py]
    python -m benchmarks.end_to_end theirs --workdir RUN [options of train.py]

`ours` runs train.py and eval.py as a user does. `theirs` does the same work with the PyTorch baseline: the same images,
training batches, patches and measurements, with one DataLoader worker per core. Both write accuracies and seconds to
RUN/end_to_end.json. If `ours` was interrupted and resumes, `seconds` counts from its last start, and
`training_seconds` covers the whole training. The defaults take half a day on two CPU cores; they are meant for a GPU.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from empssl_jax.config import Config
from empssl_jax.config.config_files import parse_train_options
from empssl_jax.data.datasets import SPLITS, load_datasets
from empssl_jax.run_folder.results import load_results
from empssl_jax.run_folder.step_files import seconds_so_far
from empssl_jax.runtime.user_errors import user_errors_exit

START = time.perf_counter()
ROOT = Path(__file__).parents[1]


def ours(config: Config, arguments: list[str]) -> dict[str, float]:
    """Runs train.py and eval.py as users do, each in its own process; eval.py computes the embeddings again."""
    # `timeout` sends SIGTERM to train.py too. Ignore it here, and wait until train.py has saved.
    signal.signal(signal.SIGTERM, lambda *_: None)
    for command in (["train.py", *arguments, "--no-report"], ["eval.py", "--workdir", config.run.workdir]):
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    workdir = Path(config.run.workdir)
    results = load_results(workdir)
    accuracies = {"kNN": results["kNN"]["top1"], "linear": results["linear"]["top1"]}
    return accuracies | {"training_seconds": seconds_so_far(workdir)}


def theirs(config: Config) -> dict[str, float]:
    """Does the same work with the baseline."""
    import torch

    from benchmarks import baseline_torch as baseline

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workers = len(os.sched_getaffinity(0))
    model = baseline.Encoder(config.model.width, config.model.hidden_dim, config.model.projection_dim)
    model = model.to(device, memory_format=torch.channels_last)
    datasets = load_datasets(config)

    def loader(split: str, num_patches: int, batch_size: int, train: bool) -> baseline.DataLoader:
        images, labels = getattr(datasets, split)[:2]
        dataset = baseline.PatchDataset(images, labels, num_patches, config.patches.patch_size)
        return baseline.loader(dataset, batch_size, workers, train)

    patches = config.patches.train_patches
    batches = loader("train", patches, config.training.batch_size, True)
    for step, loss in enumerate(baseline.train(model, batches, config.training.max_epochs, patches, device)):
        if step % 50 == 0:
            print(f"step {step}: loss {loss:.2f}, {time.perf_counter() - START:.0f} s", flush=True)
    patches = config.evaluation.valid_patches
    embedded = {split: baseline.embed(model, loader(split, patches, 50, False), device) for split in SPLITS}
    train, test = embedded["train"], embedded["test"]
    options = config.evaluation
    scores = baseline.knn_scores(test[0], train[0], train[1], 10, options.num_neighbours, options.temperature)
    knn = (scores.argmax(dim=1) == test[1]).float().mean().item()
    return {"kNN": knn, "linear": baseline.linear_probe(train, test, 10, options.linear_epochs)}


def main(side: str, arguments: list[str]) -> None:
    """Runs one side, and writes its accuracies and seconds."""
    config = parse_train_options(arguments)
    workdir = Path(config.run.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    accuracies = ours(config, arguments) if side == "ours" else theirs(config)
    result = {"seconds": time.perf_counter() - START, **accuracies}
    (workdir / "end_to_end.json").write_text(json.dumps(result) + "\n")
    print(result)


if __name__ == "__main__":
    with user_errors_exit():
        main(sys.argv[1], sys.argv[2:])
