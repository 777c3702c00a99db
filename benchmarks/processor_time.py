"""Processor seconds of a train step on CPU, which a busy machine disturbs less than the time that passes.

    python -m benchmarks.processor_time ours bfloat16 --width 16 --patch-size 16
    MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_ARENA_MAX=1 \
        python -m benchmarks.processor_time theirs bfloat16

The variables of the second line give the baseline the allocator that runtime/memory.py sets up for ours. Prints the
lowest and the median of several steps after the first. Alternate the commands that are to be compared.
"""

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from benchmarks.measure import run_times
from benchmarks.sizes import Sizes, Work
from empssl_jax.config import ModelConfig


@dataclass(frozen=True)
class Options:
    """The step that is measured."""

    side: Annotated[Literal["ours", "theirs"], tyro.conf.Positional]
    precision: Annotated[Literal["float32", "bfloat16"], tyro.conf.Positional]
    # Images of a step; each becomes 20 patches.
    images: int = 5
    # Channels of the stem; the baseline has 64. The hidden and projection dimensions scale with it.
    width: int = 64
    # Side of the patches in pixels.
    patch_size: int = 32
    # Measured steps.
    repeats: int = 5


def train_step(options: Options) -> Work:
    """The work of one step."""
    sizes = Sizes(images=options.images)
    if options.side == "theirs":
        from benchmarks import theirs

        return theirs.train_step(sizes, options.patch_size, mixed=options.precision == "bfloat16")
    from benchmarks import ours
    from benchmarks.train_step import ready_step, work_of
    from empssl_jax.runtime import memory

    memory.keep_freed_memory()
    width = options.width
    model = ModelConfig(width=width, hidden_dim=64 * width, projection_dim=16 * width, precision=options.precision)
    return work_of(*ready_step(dataclasses.replace(ours.make_config(sizes, options.patch_size), model=model)))


def main(options: Options) -> None:
    """Measures the steps and prints their processor seconds."""
    seconds = [times.processor for times in run_times(train_step(options), options.repeats)]
    lowest, median = min(seconds), statistics.median(seconds)
    print(f"{options.side} {options.precision}: lowest {lowest:.3f} s, median {median:.3f} s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
