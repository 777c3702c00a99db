"""Root mean squares of every layer's parameters and BatchNorm statistics, of several runs side by side, in Markdown.

python -m experiments.layer_norms RUN [RUN ...]
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from empssl_jax.evaluation.trained_encoder import restore_encoder
from empssl_jax.inference.torch_names import COUNTER, to_torch
from empssl_jax.runtime.user_errors import user_errors_exit


@dataclass(frozen=True)
class Options:
    """The runs to compare."""

    # Folders of runs with encoders of the same shape.
    runs: tyro.conf.Positional[tuple[str, ...]]


def norms_of(run: str) -> dict[str, float]:
    """The norm of each array of a run's newest checkpoint, divided by the root of its size: its root mean square."""
    encoder = restore_encoder(Path(run), "latest")
    weights = to_torch(encoder.state, encoder.config.model, encoder.step)
    arrays = {name: np.float64(array) for name, array in weights.items() if not name.endswith(COUNTER)}
    return {name: float(np.sqrt(np.mean(array**2))) for name, array in arrays.items()}


def main(options: Options) -> None:
    """Prints a row an array."""
    columns = {run: norms_of(run) for run in options.runs}
    print("| array, root mean square |", " | ".join(columns), "|")
    print("| --- |", "--- | " * len(columns))
    for name in next(iter(columns.values())):
        values = [norms.get(name, float("nan")) for norms in columns.values()]
        if any(values):
            print(f"| {name} |", " | ".join(f"{value:.4g}" for value in values), "|")


if __name__ == "__main__":
    with user_errors_exit():
        main(tyro.cli(Options, description=__doc__))
