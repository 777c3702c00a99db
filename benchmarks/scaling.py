"""Measures how time and memory of the train step grow with devices, images, patches and the projection dimension.

    python -m benchmarks.scaling [--output benchmarks/results/scaling.json]

Each quantity is doubled on its own for a small model (width 16, patches of 16x16, hidden 1024, projection 256), whose
step takes a second on two cores. The exponents of time and memory are slopes of lines fitted to their logarithms.
Without accelerators, the devices are virtual ones that share the cores of the CPU: there, a constant time means that
dividing the work has no cost. The memory of embedding and kNN is measured too.
"""

import dataclasses
import functools
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import measure
from benchmarks.measure import RESULTS, temporary_bytes
from benchmarks.train_step import ready_step, work_of
from empssl_jax.config import Config, EvaluationConfig, ModelConfig, PatchConfig, TrainingConfig
from empssl_jax.evaluation import embeddings, knn
from empssl_jax.method.encoder import init_encoder
from empssl_jax.runtime.devices import device_mesh

REPEATS = 3


@dataclass(frozen=True)
class Options:
    """What to measure."""

    # Sizes of the work. TINY is for a rehearsal.
    size: Literal["auto", "TINY"] = "auto"
    # JSON file to write. The tables are written beside it, with the suffix .md.
    output: Path = RESULTS / "scaling.json"


def base_config(tiny: bool) -> Config:
    """The config whose quantities are varied one at a time."""
    return Config(
        patches=PatchConfig(patch_size=16, train_patches=4 if tiny else 16),
        model=ModelConfig(
            width=4 if tiny else 16, hidden_dim=64 if tiny else 1024, projection_dim=256, precision="float32"
        ),
        training=TrainingConfig(batch_size=8 if tiny else 32),
    )


def varied(config: Config, quantity: str, value: int) -> Config:
    """The config with another value of one quantity; unchanged for devices, which it does not include."""
    groups = {"images": ("training", "batch_size"), "patches": ("patches", "train_patches")}
    groups |= {"projection_dim": ("model", "projection_dim")}
    if quantity == "devices":
        return config
    group, field = groups[quantity]
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{field: value})})


def step_cost(config: Config, num_devices: int) -> dict[str, float]:
    """Median seconds of a step, and XLA's temporary memory per device in bytes."""
    step, arguments = ready_step(config, num_devices)
    times = measure.run_times(work_of(step, arguments), REPEATS)
    seconds = statistics.median(run.wall for run in times)
    return {"seconds": seconds, "temporary_bytes": temporary_bytes(step)}


def exponent(values: list[int], costs: list[float]) -> float:
    """Slope of the costs against the values on logarithmic scales; NaN for a single value."""
    if len(values) < 2:
        return float("nan")
    return float(np.polyfit(np.log(values), np.log(costs), 1)[0])


def step_growth(config: Config, quantity: str, values: list[int]) -> dict[str, Any]:
    """Costs of a step as one quantity grows."""
    costs = [step_cost(varied(config, quantity, value), value if quantity == "devices" else 1) for value in values]
    table: dict[str, Any] = {"values": values}
    for name in ("seconds", "temporary_bytes"):
        table[name] = [cost[name] for cost in costs]
        table[f"{name}_exponent"] = exponent(values, table[name])
    print(quantity, table, flush=True)
    return table


def embedding_memory(config: Config, num_patches: int) -> int:
    """Temporary memory of the compiled embedding function, in bytes."""
    config = dataclasses.replace(config, evaluation=EvaluationConfig(valid_patches=num_patches))
    state = jax.eval_shape(lambda: init_encoder(config.model, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.uint8)
    indices = jax.ShapeDtypeStruct((16,), jnp.int32)
    embed = jax.jit(embeddings.make_embed(config, device_mesh(1)))
    return temporary_bytes(embed.lower(state, images, indices).compile())


def knn_memory(num_queries: int) -> int:
    """Temporary memory of compiled kNN against a bank of 2,000 embeddings, in bytes."""
    shapes = (jax.ShapeDtypeStruct((n, 64), jnp.float32) for n in (num_queries, 2000))
    labels = jax.ShapeDtypeStruct((2000,), jnp.int32)
    scores = jax.jit(functools.partial(knn.knn_scores, num_classes=10, num_neighbours=20, temperature=0.07))
    return temporary_bytes(scores.lower(*shapes, labels).compile())


def markdown(steps: dict[str, Any]) -> str:
    """A Markdown table for each quantity."""
    lines = []
    for quantity, table in steps.items():
        lines += [f"| {quantity} | " + " | ".join(map(str, table["values"])) + " | exponent |"]
        lines += ["| --- " * (len(table["values"]) + 2) + "|"]
        seconds = " | ".join(f"{value:.2f}" for value in table["seconds"])
        memory = " | ".join(f"{value / 1e6:.0f}" for value in table["temporary_bytes"])
        lines += [f"| seconds | {seconds} | {table['seconds_exponent']:.2f} |"]
        lines += [f"| temporary MB a device | {memory} | {table['temporary_bytes_exponent']:.2f} |", ""]
    return "\n".join(lines)


def main(options: Options) -> None:
    """Measures every quantity and writes the JSON file and the tables."""
    tiny = options.size == "TINY"
    config = base_config(tiny)
    quantities = {"devices": [1, 2, 4, 8], "images": [8, 16, 32, 64], "patches": [4, 8, 16, 32]}
    quantities |= {"projection_dim": [64, 128, 256, 512, 1024]}
    if tiny:
        quantities = {"devices": [1, 2], "patches": [2, 4]}
    content: dict[str, Any] = {"config": dataclasses.asdict(config), "train step": {}}
    quantities["devices"] = [value for value in quantities["devices"] if value <= jax.device_count()]
    for quantity, values in quantities.items():
        content["train step"][quantity] = step_growth(config, quantity, values)
        measure.write(options.output, content)
    patches, queries = [4, 16, 64], [256, 1024, 4096]
    content["embedding"] = {"patches": patches, "temporary_bytes": [embedding_memory(config, n) for n in patches]}
    content["kNN"] = {"queries": queries, "temporary_bytes": [knn_memory(n) for n in queries]}
    measure.write(options.output, content)
    table = markdown(content["train step"])
    for name in ("embedding", "kNN"):
        (quantity, values), (_, memory) = content[name].items()
        table += f"\n{name}: temporary MB at {values} {quantity}: {[round(value / 1e6, 1) for value in memory]}\n"
    options.output.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
