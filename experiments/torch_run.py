"""Trains a run's configuration in plain PyTorch on the same images, to compare accuracies and weights with ours.

    python -m experiments.torch_run [options of train.py]
    empssl import RUN/weights.safetensors --workdir IMPORTED --config FILE
    empssl eval --workdir IMPORTED
    python -m experiments.layer_norms OURS IMPORTED

Uses the network, transforms, loss and LARS of benchmarks/baseline_torch.py, on one thread. Writes metrics.jsonl and
weights.safetensors to the workdir; `empssl import` turns the weights into a run. Needs the extra `bench`.
"""

import dataclasses
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from benchmarks import baseline_torch as baseline
from empssl_jax.config import Config
from empssl_jax.config.config_files import parse_train_options
from empssl_jax.config.errors import require
from empssl_jax.data.datasets import load_split
from empssl_jax.runtime.user_errors import user_errors_exit

SAVE_EVERY = 10  # steps
# Names of the baseline's modules in the files that `empssl import` reads.
MODULES = {"backbone.0": "backbone.conv1", "backbone.1": "backbone.bn1"}
MODULES |= {f"backbone.{stage + 2}": f"backbone.layer{stage}" for stage in (1, 2, 3, 4)}
MODULES |= {"backbone.8.1": "pre_feature.0", "backbone.8.2": "pre_feature.1", "projector": "projection"}
# The options that change what is learned and that the baseline follows.
OBJECTIVE = ("invariance_coefficient", "coding_rate_eps")
FOLLOWED = {
    "patches": ("train_patches", "patch_size"),
    "model": ("width", "hidden_dim", "projection_dim"),
    "training": ("batch_size", "max_epochs", "learning_rate", "seed", *OBJECTIVE),
}


def exported(model: nn.Module) -> dict[str, Tensor]:
    """The weights by the names that `empssl import` reads, with the two biases that the baseline does not have."""
    weights = {}
    for name, array in model.state_dict().items():
        module = next(module for module in MODULES if name.startswith(module + "."))
        weights[MODULES[module] + name.removeprefix(module)] = array.contiguous()
    for layer in ("pre_feature.0", "projection.0"):
        weights[f"{layer}.bias"] = torch.zeros(len(weights[f"{layer}.weight"]))
    return weights


def check_followed(config: Config) -> None:
    """Raises UserError if an option that the baseline does not follow has another value than its default."""
    for group, followed in FOLLOWED.items():
        ours = getattr(config, group)
        for field in dataclasses.fields(ours):
            value, default = getattr(ours, field.name), getattr(type(ours)(), field.name)
            remedy = f"the PyTorch baseline does not follow it, so leave it at {default}"
            require(field.name in followed or value == default, field.name, value, remedy)


def train(config: Config, model: nn.Module) -> Iterator[dict[str, float]]:
    """Trains the model and yields each step's metrics."""
    training, num_patches = config.training, config.patches.train_patches
    images = load_split(config.data, "train", config.run.data_dir, config.run.cache_dir)
    dataset = baseline.PatchDataset(images.images, images.labels, num_patches, config.patches.patch_size)
    batches = baseline.loader(dataset, training.batch_size, workers=0, train=True)
    steps = training.max_epochs * len(batches)
    optimizer, scheduler = baseline.make_optimizer(model, steps, training.learning_rate)
    model.train()
    for _ in range(training.max_epochs):
        for patches, _ in batches:
            _, projections = model(baseline.to_device(patches, torch.device("cpu")))
            z = projections.unflatten(0, (num_patches, -1))
            rate, similarity = baseline.coding_rate(z, training.coding_rate_eps), baseline.similarity(z)
            loss = -rate - training.invariance_coefficient * similarity
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            yield {"loss": loss.item(), "coding_rate": rate.item(), "similarity": similarity.item()}


def main(config: Config) -> None:
    """Trains, and writes metrics and weights."""
    check_followed(config)
    workdir, seed = Path(config.run.workdir), config.training.seed
    workdir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    torch.set_num_threads(1)
    sizes = config.model
    model = baseline.Encoder(sizes.width, sizes.hidden_dim, sizes.projection_dim)
    model = model.to(memory_format=torch.channels_last)
    with (workdir / "metrics.jsonl").open("w") as file:
        for step, metrics in enumerate(train(config, model)):
            print(json.dumps({"step": step, **metrics}), file=file, flush=True)
            if step % SAVE_EVERY == 0:
                safetensors.torch.save_file(exported(model), workdir / "weights.safetensors")
    safetensors.torch.save_file(exported(model), workdir / "weights.safetensors")


if __name__ == "__main__":
    with user_errors_exit():
        main(parse_train_options(sys.argv[1:], "python -m experiments.torch_run"))
