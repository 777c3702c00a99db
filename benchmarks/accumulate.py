"""Memory and time of a train step against --accumulate, for the options of a training command.

    python -m benchmarks.accumulate --config configs/imagenet100.py --precision bfloat16
    python -m benchmarks.accumulate --config configs/digits.py --steps 5

The memory is XLA's own count for one device of this machine, by compilation alone. On CPU, XLA computes bfloat16
convolutions in float32, which takes more memory than on a GPU. With --steps, that many steps of each row are timed, by
the clock and by the processor time of all threads, which other programs on the machine disturb less.
"""

import dataclasses
import statistics
import sys
import time
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.tpu_aot import IMAGE_SIDE, STEPS_PER_EPOCH, compile_train_step
from empssl_jax.config import Config
from empssl_jax.config.config_files import first_options, parse_train_options
from empssl_jax.data.batches import Batch
from empssl_jax.method.encoder import default_precision
from empssl_jax.method.hyperparameters import Hyperparameters
from empssl_jax.method.train_step import create_state
from empssl_jax.runtime.devices import device_mesh, replicated, split_images
from empssl_jax.runtime.user_errors import user_errors_exit

PIECES = (1, 2, 5, 10)


@dataclass(frozen=True)
class Options:
    """What to measure beside memory."""

    # Steps to time of each row.
    steps: int = 0


def median_seconds(step: jax.stages.Compiled, config: Config, mesh: Mesh, steps: int) -> tuple[float, float]:
    """Median seconds of a step on random images and of its processor time, after a warm-up."""
    hyperparameters = jax.device_put(Hyperparameters.of(config.training, STEPS_PER_EPOCH), replicated(mesh))
    state = create_state(config.model, hyperparameters, mesh)
    size, side = config.training.batch_size, config.data.image_size or IMAGE_SIDE
    images = np.random.default_rng(0).integers(0, 256, (size, side, side, 3), np.uint8)
    batch = jax.device_put(Batch(images, np.arange(size, dtype=np.int32)), split_images(mesh))
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter(), time.process_time()
        state, metrics = step(hyperparameters, state, batch)
        jax.block_until_ready(metrics)
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    wall, processor = map(statistics.median, zip(*times[1:], strict=True))
    return wall, processor


def main(arguments: list[str]) -> None:
    """Prints a table with a row for each number of pieces that divides the config's patches."""
    options, rest = first_options(Options, arguments)
    config, mesh = parse_train_options(rest), device_mesh(1)
    if config.model.precision == "auto":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, precision=default_precision()))
    columns = ["--accumulate", "temporary MB", *["seconds", "processor seconds"] * bool(options.steps)]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for pieces in PIECES:
        if config.patches.train_patches % pieces == 0:
            config = dataclasses.replace(config, training=dataclasses.replace(config.training, accumulate=pieces))
            step = compile_train_step(config, mesh)
            row = [str(pieces), f"{step.memory_analysis().temp_size_in_bytes / 1e6:,.0f}"]
            row += [f"{x:.3f}" for x in median_seconds(step, config, mesh, options.steps)] if options.steps else []
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    with user_errors_exit():
        main(sys.argv[1:])
