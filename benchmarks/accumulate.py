"""Memory and time of a train step against --accumulate, for the options of a training command.

    python -m benchmarks.accumulate --config configs/digits.py --steps 5

The memory is XLA's own count for one device of this machine, by compilation alone; benchmarks.aot has that of a GPU.
With --steps, that many steps of each row are timed, by the clock and by the processor time of all threads, which other
programs on the machine disturb less.
"""

import dataclasses
import statistics
import sys
from dataclasses import dataclass

from benchmarks.measure import run_times, temporary_bytes
from benchmarks.train_step import compile_step, step_arguments, work_of
from empssl_jax.config.config_files import first_options, parse_train_options
from empssl_jax.method.encoder import with_known_precision
from empssl_jax.runtime.devices import device_mesh
from empssl_jax.runtime.user_errors import user_errors_exit

PIECES = (1, 2, 5, 10)


@dataclass(frozen=True)
class Options:
    """What to measure beside memory."""

    # Steps to time of each row.
    steps: int = 0


def main(arguments: list[str]) -> None:
    """Prints a table with a row for each number of pieces that divides the config's patches."""
    options, rest = first_options(Options, arguments)
    config, mesh = parse_train_options(rest), device_mesh(1)
    config = dataclasses.replace(config, model=with_known_precision(config.model))
    columns = ["--accumulate", "temporary MB", *["seconds", "processor seconds"] * bool(options.steps)]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for pieces in PIECES:
        if config.patches.train_patches % pieces == 0:
            config = dataclasses.replace(config, training=dataclasses.replace(config.training, accumulate=pieces))
            step = compile_step(config, mesh)
            row = [str(pieces), f"{temporary_bytes(step) / 1e6:,.0f}"]
            if options.steps:
                times = run_times(work_of(step, step_arguments(config, mesh)), options.steps)
                row += [f"{statistics.median(column):.3f}" for column in zip(*times, strict=True)]
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    with user_errors_exit():
        main(sys.argv[1:])
