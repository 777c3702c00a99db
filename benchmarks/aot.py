"""Compiles the real programs for accelerators that this machine lacks, and reports what the compilers know.

    python -m benchmarks.aot --topology v5e:2x4 --topology v5e:8x8
    python -m benchmarks.aot --topology h200:1 --config configs/cifar10_best.py --program embedding

The other options are those of `empssl train`. Each device gets the config's batch, so the batch grows with the number
of devices, and any value that grows in the table limits scaling. Nothing runs, so no times are known. Needs the extra
`tpu` for TPUs (minutes per topology), and `cuda`, `cuda12` or `cuda13` for GPUs.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from benchmarks.absent_devices import mesh_of, prepare
from benchmarks.measure import write
from benchmarks.program_text import COLLECTIVES, KINDS, collectives, kernels
from benchmarks.sizes import IMAGE_SIDE
from benchmarks.train_step import compile_step
from empssl_jax.config import Config
from empssl_jax.config.config_files import first_options, parse_train_options
from empssl_jax.config.errors import UserError
from empssl_jax.evaluation.embeddings import batch_size_of, compiled_embed
from empssl_jax.method.encoder import encoder_template, with_known_precision
from empssl_jax.runtime.user_errors import user_errors_exit

Program = Literal["train step", "embedding"]


@dataclass(frozen=True)
class Options:
    """The accelerators, and what is compiled for them."""

    # TPU generation and grid of chips, such as v5e:2x4, or h200 and a number of GPUs, such as h200:8. May be given
    # several times.
    topology: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    # The train step, or the embedding of a batch of images.
    program: Program = "train step"
    # JSON file to write.
    output: str = "benchmarks/results/aot.json"


def on_each_device(config: Config, mesh: Mesh) -> Config:
    """The config with its batches on each device, and the precision of the devices."""
    training, evaluation = config.training, config.evaluation
    given = evaluation.embedding_batch_size  # without it, the default is already for each device
    return dataclasses.replace(
        config,
        model=with_known_precision(config.model),
        training=dataclasses.replace(training, batch_size=training.batch_size * mesh.size),
        evaluation=dataclasses.replace(evaluation, embedding_batch_size=given and given * mesh.size),
    )


def compile_program(config: Config, program: Program, mesh: Mesh) -> jax.stages.Compiled:
    """The train step or the embedding of a batch, for devices that need not exist."""
    if program == "train step":
        return compile_step(config, mesh)
    embed: Any = compiled_embed(config.model, config.patches, config.evaluation.embedding, mesh)
    size, side = batch_size_of(config.evaluation, mesh), config.data.image_size or IMAGE_SIDE
    seed, images, indices = np.int32(0), np.empty((size, side, side, 3), np.uint8), np.empty(size, np.int32)
    return embed.lower(seed, encoder_template(config.model), images, indices).compile()


def measure(config: Config, program: Program, topology: str, mesh: Mesh) -> dict[str, Any]:
    """The compiler's figures for one topology. Bytes, FLOPs and kernels are those of one device and one run.

    The FLOPs are XLA's own count, which it makes for TPUs only. It counts the body of a loop once (part of the coding
    rate's factorisation, and all patches of an embedding), and a float32 product of several bfloat16 passes once.

    Raises:
        UserError: the program does not fit the memory of the device.
    """
    device = mesh.devices.flat[0]
    start = time.process_time()
    # Programs differ by backend, and JAX would say that it is the CPU.
    with mock.patch.object(jax, "default_backend", return_value=device.platform):
        config = on_each_device(config, mesh)
        try:
            compiled: Any = compile_program(config, program, mesh)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            option = "--batch-size" if program == "train step" else "--embedding-batch-size"
            raise UserError(f"{option} is too large for the memory of a device of {topology}: give fewer.") from error
    text = compiled.as_text()
    is_step = program == "train step"
    return {
        "topology": topology,
        "program": program,
        "device_kind": device.device_kind,
        "devices": mesh.size,
        "hosts": len({device.process_index for device in mesh.devices.flat}),
        "images": config.training.batch_size if is_step else batch_size_of(config.evaluation, mesh),
        "precision": config.model.precision,
        "compile_cpu_seconds": round(time.process_time() - start, 1),
        "memory_bytes": _memory(compiled.memory_analysis()),
        "flops": (compiled.cost_analysis() or {}).get("flops"),
        "kernels": {} if device.platform == "tpu" else kernels(text),
        "collectives": collectives(text),
    }


def _memory(analysis: Any) -> dict[str, int]:
    """Bytes by purpose. The total counts outputs that reuse the memory of donated arguments once."""
    memory = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }
    return memory | {"total": sum(memory.values()) - analysis.alias_size_in_bytes}


def format_table(measured: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with one row per topology."""
    kinds = [kind for kind in COLLECTIVES if any(kind in row["collectives"] for row in measured)]
    of_kernels = [kind for kind in KINDS if any(kind in row["kernels"] for row in measured)]
    memory = list(measured[0]["memory_bytes"])
    header = ["topology", "devices", "images", *(f"{name} MB" for name in memory)]
    has_flops = any(row["flops"] for row in measured)
    header += ["TFLOP"] * has_flops
    header += [f"{kind}: count, GB" for kind in of_kernels] + [f"{kind}: count, MB" for kind in kinds]
    lines = [header, ["---"] * len(header)]
    for row in measured:
        cells = [row["topology"], str(row["devices"]), str(row["images"])]
        cells += [f"{row['memory_bytes'][name] / 1e6:,.1f}" for name in memory]
        cells += [f"{row['flops'] / 1e12:.3g}" if row["flops"] else ""] * has_flops
        cells += [_cell(row["kernels"], kind, 1e9) for kind in of_kernels]
        lines.append(cells + [_cell(row["collectives"], kind, 1e6) for kind in kinds])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(found: dict[str, dict[str, Any]], kind: str, unit: float) -> str:
    entry = found.get(kind, {"count": 0, "bytes": 0})
    return f"{entry['count']}, {entry['bytes'] / unit:,.1f}"


def main(arguments: list[str]) -> None:
    """Compiles for each topology in turn, rewrites the file after each, and prints the table."""
    options, rest = first_options(Options, arguments)
    if not options.topology:
        raise UserError("--topology is missing: give at least one, like v5e:2x4 or h200:8.")
    config = parse_train_options(rest)
    for topology in options.topology:
        prepare(topology)
    meshes = {topology: mesh_of(topology) for topology in options.topology}
    measured: list[dict[str, Any]] = []
    for topology, mesh in meshes.items():
        measured.append(measure(config, options.program, topology, mesh))
        write(Path(options.output), {"arguments": arguments, "topologies": measured})
    print(format_table(measured))


if __name__ == "__main__":
    with user_errors_exit():
        main(sys.argv[1:])
