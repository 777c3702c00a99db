"""Compiles the real train step for TPUs without a TPU, and reports the memory and the communication of each chip.

    python -m benchmarks.tpu_aot --topology v5e:2x4 --topology v5e:8x8

libtpu's compiler needs only the name of a topology. Each chip gets the same number of images, so the batch grows with
the number of chips (weak scaling), and any value that grows in the table limits scaling. Nothing runs, so no times are
known. Needs the extra `tpu`, and minutes per topology.
"""

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from jax.experimental import topologies
from jax.sharding import Mesh

from benchmarks.train_step import compile_step
from empssl_jax.config import Config, ModelConfig, PatchConfig, TrainingConfig
from empssl_jax.config.errors import UserError, install, require
from empssl_jax.runtime.devices import DATA_AXIS
from empssl_jax.runtime.user_errors import user_errors_exit

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# An asynchronous collective has a -start and a -done. The -done is counted, because its shape is that of the result
# alone; the shape of most -starts includes the operands.
_COLLECTIVE = re.compile(
    rf"^\s*(?:ROOT )?%?[\w.-]+ = (\((?:[^()]|\([^()]*\))*\)|\S+) ({'|'.join(KINDS)})(?:-done)?\(", re.MULTILINE
)
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")

_flat = tyro.conf.arg(name="")


@dataclass(frozen=True)
class Options:
    """The TPUs, and the training step that is compiled for them."""

    # TPU generation and grid of chips, such as v5e:2x4. May be given several times.
    topology: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    # Images of a step on each chip.
    images_per_chip: int = 100
    # JSON file to write.
    output: str = "benchmarks/results/tpu_aot.json"
    patches: Annotated[PatchConfig, _flat] = dataclasses.field(default_factory=PatchConfig)
    model: Annotated[ModelConfig, _flat] = dataclasses.field(default_factory=ModelConfig)


def collectives(hlo: str) -> dict[str, dict[str, Any]]:
    """Count, bytes of the results, and bytes and shape of the largest array, of each kind of collective in HLO text.

    A tuple counts once, with the bytes of all its arrays. A collective in a loop counts as if the loop ran once.
    """
    found: dict[str, dict[str, Any]] = {}
    for shape, kind in _COLLECTIVE.findall(hlo):
        arrays = [(_bytes(*match.groups()), match.group()) for match in _ARRAY.finditer(shape)]
        entry = found.setdefault(kind, {"count": 0, "bytes": 0, "largest": (0, "")})
        entry["count"] += 1
        entry["bytes"] += sum(size for size, _ in arrays)
        entry["largest"] = max(entry["largest"], *arrays)
    return found


def _bytes(bits: str | None, dimensions: str) -> int:
    """Bytes of an array without the padding of its layout. pred has no number of bits in its name and takes a byte."""
    return -(-int(bits or 8) * math.prod(int(d) for d in dimensions.split(",") if d) // 8)


def tpu_mesh(topology: str) -> Mesh:
    """The chips of a topology along the data axis; raises UserError if libtpu does not know the topology."""
    try:
        devices = topologies.get_topology_desc(topology, platform="tpu").devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--topology {topology!r} is refused by libtpu ({reason}): give one like v5e:2x4.") from error
    return jax.make_mesh((len(devices),), (DATA_AXIS,), (jax.sharding.AxisType.Auto,), devices=devices)


def measure(options: Options, topology: str, mesh: Mesh) -> dict[str, Any]:
    """The compiler's figures for one topology. Bytes and FLOPs are per chip and step.

    The FLOPs are XLA's own count. It counts the body of a loop once (part of the coding rate's factorisation), and a
    float32 product made of several bfloat16 passes (the rest of the coding rate) once.

    Raises:
        UserError: the step does not fit the memory of the chip.
    """
    # "auto" means the default of the target hardware, not of this machine.
    precision = "bfloat16" if options.model.precision == "auto" else options.model.precision
    model = dataclasses.replace(options.model, precision=precision)
    batch_size = options.images_per_chip * mesh.size
    config = Config(patches=options.patches, model=model, training=TrainingConfig(batch_size=batch_size))
    start = time.process_time()
    try:
        compiled: Any = compile_step(config, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        remedy = f"the step does not fit the memory of a chip of {topology}, give fewer"
        raise UserError(f"--images-per-chip is {options.images_per_chip}: {remedy}.") from error
    return {
        "topology": topology,
        "device_kind": mesh.devices.flat[0].device_kind,
        "chips": mesh.size,
        "hosts": len({device.process_index for device in mesh.devices.flat}),
        "batch_size": batch_size,
        "precision": precision,
        "compile_cpu_seconds": round(time.process_time() - start, 1),
        "memory_bytes": _memory(compiled.memory_analysis()),
        "flops": compiled.cost_analysis()["flops"],
        "collectives": collectives(compiled.as_text()),
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
    kinds = [kind for kind in KINDS if any(kind in row["collectives"] for row in measured)]
    memory = list(measured[0]["memory_bytes"])
    header = ["topology", "chips", "images", *(f"{name} MB" for name in memory), "TFLOP"]
    header += [f"{kind}: count, MB" for kind in kinds]
    lines = [header, ["---"] * len(header)]
    for row in measured:
        cells = [row["topology"], str(row["chips"]), str(row["batch_size"])]
        cells += [f"{row['memory_bytes'][name] / 1e6:,.1f}" for name in memory] + [f"{row['flops'] / 1e12:.3g}"]
        found = [row["collectives"].get(kind, {"count": 0, "bytes": 0}) for kind in kinds]
        lines.append(cells + [f"{entry['count']}, {entry['bytes'] / 1e6:,.1f}" for entry in found])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def provenance() -> dict[str, Any]:
    """The date, the commit ("-dirty" if files differ from it, None outside a git checkout) and the versions."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    return {"date": datetime.date.today().isoformat(), "commit": git.stdout.strip() or None, "versions": versions}


def prepare_libtpu() -> None:
    """Prepares libtpu to compile in this process, before JAX uses any device; raises UserError if it is missing."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"libtpu, which has the compiler for TPUs, is missing: {install('tpu')}.")
    # By default, libtpu queries a cloud's metadata server for the machine and complains if there is none, and only one
    # process may load it, as if it used a TPU. Host and accelerator type are arbitrary: only the topology matters.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # With libtpu enabled, JAX would look for TPUs. Operations that it runs while tracing belong on the CPU.
    jax.config.update("jax_platforms", "cpu")


def main(arguments: Sequence[str]) -> None:
    """Compiles for each topology in turn, rewrites the file after each, and prints the table."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    require(options.images_per_chip > 0, "images_per_chip", options.images_per_chip, "give a whole number above 0")
    if not options.topology:
        raise UserError("--topology is missing: give at least one, like v5e:2x4.")
    prepare_libtpu()
    meshes = {topology: tpu_mesh(topology) for topology in options.topology}
    output = Path(options.output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror}): give another file.") from error
    measured: list[dict[str, Any]] = []
    results = provenance() | {"options": dataclasses.asdict(options), "topologies": measured}
    for topology, mesh in meshes.items():
        measured.append(measure(options, topology, mesh))
        output.write_text(json.dumps(results, indent=2) + "\n")
    print(format_table(measured))


if __name__ == "__main__":
    with user_errors_exit():
        main(sys.argv[1:])
