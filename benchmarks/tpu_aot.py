"""Compiles the real train step for TPUs, on a machine without any, and reports what each chip would hold and exchange.

python -m benchmarks.tpu_aot --topology v5e:2x4 --topology v5e:8x8

libtpu's compiler needs no more than the name of a topology. Each gets the same images a chip, so that the batch grows
with the chips (weak scaling): whatever grows in the table sets the limit of scaling. Nothing runs, so no time is known.
It needs the extra `tpu` and minutes a topology.
"""

import dataclasses
import datetime
import functools
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
import numpy as np
import tyro
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from empssl_jax.config import Config, ModelConfig, PatchConfig, TrainingConfig
from empssl_jax.config.errors import UserError, require
from empssl_jax.data.batches import Batch
from empssl_jax.method.train_step import create_state, learning_rate_schedule, make_optimizer, make_train_step
from empssl_jax.runtime.devices import DATA_AXIS, replicated, split_images
from empssl_jax.runtime.user_errors import user_errors_exit

IMAGE_SIDE = 32  # of CIFAR-10
STEPS_PER_EPOCH = 100  # a constant of the program, of no effect on its size
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# An asynchronous collective is a -start and a -done. The -done is counted: its shape is the result and nothing else,
# where that of most -starts has the operands in it too.
_COLLECTIVE = re.compile(
    rf"^\s*(?:ROOT )?%?[\w.-]+ = (\((?:[^()]|\([^()]*\))*\)|\S+) ({'|'.join(KINDS)})(?:-done)?\(", re.MULTILINE
)
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")

_flat = tyro.conf.arg(name="")


@dataclass(frozen=True)
class Options:
    """Which TPUs, and what they train."""

    topology: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A generation and its grid of chips, as v5e:2x4; may be given several times."""
    images_per_chip: int = 100
    """Images of a step on each chip."""
    output: str = "benchmarks/results/tpu_aot.json"
    """File that receives everything measured."""
    patches: Annotated[PatchConfig, _flat] = dataclasses.field(default_factory=PatchConfig)
    model: Annotated[ModelConfig, _flat] = dataclasses.field(default_factory=ModelConfig)


def collectives(hlo: str) -> dict[str, dict[str, Any]]:
    """Count, bytes of the results, and bytes and shape of the largest array, of each kind in a compiled program's text.

    A tuple counts once, with the bytes of all its arrays. A collective inside a loop counts as if the loop ran once.
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
    """Of an array without the padding of its layout; a truth value has no bits in its name and takes a byte."""
    return -(-int(bits or 8) * math.prod(int(d) for d in dimensions.split(",") if d) // 8)


def tpu_mesh(topology: str) -> Mesh:
    """The chips of a topology along the axis of the data; raises UserError if libtpu does not know its name."""
    try:
        devices = topologies.get_topology_desc(topology, platform="tpu").devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--topology {topology!r} is refused by libtpu ({reason}): give one like v5e:2x4.") from error
    return jax.make_mesh((len(devices),), (DATA_AXIS,), (jax.sharding.AxisType.Auto,), devices=devices)


def compile_train_step(config: Config, mesh: Mesh) -> Any:
    """`make_train_step` for the chips of a mesh, none of which needs to exist: a `jax.stages.Compiled`."""
    schedule = learning_rate_schedule(config.training, STEPS_PER_EPOCH)
    optimizer = make_optimizer(config.training, schedule)
    step: Any = make_train_step(config, optimizer, schedule, STEPS_PER_EPOCH, mesh)
    state = jax.eval_shape(functools.partial(create_state, config, optimizer))
    size = config.training.batch_size
    batch = Batch(np.empty((size, IMAGE_SIDE, IMAGE_SIDE, 3), np.uint8), np.empty(size, np.int32))
    return step.lower(_placed(state, replicated(mesh)), _placed(batch, split_images(mesh))).compile()


def _placed(arrays, sharding: NamedSharding):
    """Their shapes, and where they would be."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays)


def measure(options: Options, topology: str, mesh: Mesh) -> dict[str, Any]:
    """What the compiler says of one topology; bytes and FLOPs are those of one chip and step.

    The FLOPs are XLA's own count, which takes the body of a loop once (some of the coding rate's factorisation), and a
    float32 product of several bfloat16 passes (the rest of the coding rate) as one.

    Raises:
        UserError: it does not fit the memory of the chip.
    """
    # What "auto" means on the hardware that is compiled for, not on this one.
    precision = "bfloat16" if options.model.precision == "auto" else options.model.precision
    model = dataclasses.replace(options.model, precision=precision)
    batch_size = options.images_per_chip * mesh.size
    config = Config(patches=options.patches, model=model, training=TrainingConfig(batch_size=batch_size))
    start = time.process_time()
    try:
        compiled = compile_train_step(config, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        remedy = f"this does not fit the memory of a chip of {topology}, so give fewer"
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


def _memory(analysis) -> dict[str, int]:
    """The outputs that take the place of donated arguments are in the total once."""
    memory = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }
    return memory | {"total": sum(memory.values()) - analysis.alias_size_in_bytes}


def format_table(measured: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, a row a topology."""
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
    """Lets libtpu compile in this process, where JAX must not have touched a device; raises UserError without it."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu, which has the compiler for TPUs, is missing: pip install -e '.[tpu]'.")
    # libtpu would ask a cloud's metadata server what machine this is and complain that there is none, and let a single
    # process load it, as if that took hold of a TPU. Any host and accelerator will do: the topology is what counts.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # What JAX runs itself while it traces stays off the TPUs that it would now look for.
    jax.config.update("jax_platforms", "cpu")


def main(arguments: Sequence[str]) -> None:
    """Compiles for one topology after the other, rewrites the file after each, and prints the table."""
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
