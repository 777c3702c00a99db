"""Meshes of TPUs and GPUs that this machine lacks, for which their compilers compile nevertheless."""

import importlib.util
import os
import re
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from empssl_jax.config.errors import UserError, install
from empssl_jax.runtime.devices import DATA_AXIS

H200 = Path(__file__).parent / "h200.txtpb"
GPU_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


def prepare(topology: str) -> None:
    """Prepares a compiler in this process, before JAX uses any device; raises UserError if it is missing."""
    if topology.startswith("h200"):
        if not any(importlib.util.find_spec(name) for name in GPU_PLUGINS):
            raise UserError(f"JAX's CUDA plugin, which has the compiler for GPUs, is missing: {install('cuda12')}.")
    elif importlib.util.find_spec("libtpu") is None:
        raise UserError(f"libtpu, which has the compiler for TPUs, is missing: {install('tpu')}.")
    # By default, libtpu queries a cloud's metadata server for the machine and complains if there is none, and only one
    # process may load it, as if it used a TPU. Host and accelerator type are arbitrary: only the topology matters.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # JAX would look for accelerators otherwise. Operations that it runs while tracing belong on the CPU.
    jax.config.update("jax_platforms", "cpu")


def mesh_of(topology: str) -> Mesh:
    """The devices of a topology along the data axis; raises UserError if there is no such topology."""
    if topology.startswith("h200"):
        gpus = re.fullmatch(r"h200:([1-9]\d*)", topology)
        if gpus is None:
            raise UserError(f"--topology {topology!r} does not give a number of GPUs above 0: write it as in h200:8.")
        jax.devices()  # loads the plugins
        options = {"target_config": H200.read_text(), "topology": f"1x1x{gpus[1]}"}
        devices = topologies.get_topology_desc(platform="cuda", **options).devices
    else:
        try:
            devices = topologies.get_topology_desc(topology, platform="tpu").devices
        except (jax.errors.JaxRuntimeError, RuntimeError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            remedy = "give one like v5e:2x4 or h200:8"
            raise UserError(f"--topology {topology!r} is refused by libtpu ({reason}): {remedy}.") from error
    return jax.make_mesh((len(devices),), (DATA_AXIS,), (jax.sharding.AxisType.Auto,), devices=devices)
