"""Measures a run's encoder in plain PyTorch, to check `empssl eval`: nothing but the weights and images is ours.

    python -m experiments.torch_evaluation --workdir RUN [--patches 16] [--output FILE.json]

torchvision's ResNet-18 gets the exported weights and embeds patches that torchvision's transforms make from PIL images,
as the references evaluate. kNN and the linear classifier are those of benchmarks/baseline_torch.py. Prints the
accuracies beside those in RUN/results.json. Needs the extra `bench` and a run of width 64.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks import baseline_torch as baseline
from benchmarks.measure import environment
from empssl_jax.data.datasets import ImageDataset, load_datasets
from empssl_jax.inference.image_encoder import load
from empssl_jax.inference.torch_names import to_torch
from empssl_jax.run_folder.results import load_results
from empssl_jax.runtime.user_errors import user_errors_exit
from experiments.records import append_line
from experiments.torch_run import MODULES


@dataclass(frozen=True)
class Options:
    """The run to measure."""

    # Folder of the run.
    workdir: str
    # Random patches averaged into an embedding.
    patches: int = 16
    # Seed of the patches and of the linear classifier.
    seed: int = 1
    # File that a JSON line with the accuracies is appended to.
    output: str | None = None


def load_model(workdir: Path) -> baseline.Encoder:
    """The baseline's network with the weights of a run's newest checkpoint."""
    ours = load(workdir)
    sizes = ours.config.model
    model = baseline.Encoder(sizes.width, sizes.hidden_dim, sizes.projection_dim)
    weights = to_torch(ours.state, sizes, ours.step)
    state = {}
    for name in model.state_dict():
        module = next(module for module in MODULES if name.startswith(module + "."))
        state[name] = torch.tensor(weights[MODULES[module] + name.removeprefix(module)])
    model.load_state_dict(state)
    return model.to(memory_format=torch.channels_last)


def measure(options: Options) -> dict[str, Any]:
    """Accuracies in percent."""
    workdir = Path(options.workdir)
    config, model = load(workdir).config, load_model(workdir)
    torch.manual_seed(options.seed)
    random.seed(options.seed)

    def embed(split: ImageDataset) -> tuple[torch.Tensor, torch.Tensor]:
        dataset = baseline.PatchDataset(split.images, split.labels, options.patches, config.patches.patch_size)
        return baseline.embed(model, baseline.loader(dataset, 50, 0, train=False), torch.device("cpu"))

    datasets = load_datasets(config)
    bank, test = embed(datasets.bank), embed(datasets.test)
    num_classes, evaluation = len(datasets.bank.class_names), config.evaluation
    scores = baseline.knn_scores(test[0], *bank, num_classes, evaluation.num_neighbours, evaluation.temperature)
    top5 = scores.topk(5).indices == test[1][:, None]
    accuracies = {"top1": top5[:, 0].float().mean().item(), "top5": top5.any(dim=1).float().mean().item()}
    linear = baseline.linear_probe(bank, test, num_classes, evaluation.linear_epochs)
    return {"kNN": accuracies, "linear": {"top1": linear}}


def main(options: Options) -> None:
    """Prints both sides' accuracies, and appends them to the output."""
    theirs, ours = measure(options), load_results(Path(options.workdir))
    print(json.dumps({"PyTorch": theirs, "empssl eval": ours}, indent=2))
    if options.output is not None:
        line = {"workdir": options.workdir, "patches": options.patches, "PyTorch": theirs, "empssl eval": ours}
        append_line(Path(options.output), line | environment())


if __name__ == "__main__":
    with user_errors_exit():
        main(tyro.cli(Options, description=__doc__))
