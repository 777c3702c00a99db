"""Makes one train step of the full model in a new process, and reports time and memory.

    python -m benchmarks.first_step {ours,theirs} [CPU|ACCELERATOR|TINY]

Prints one line of JSON: seconds from the start of Python to the end of the step, processor seconds of all threads,
seconds of compilation, and the peak memory of the host and of the device in bytes.
"""

import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from empssl_jax.runtime.imports import quick_imports

if TYPE_CHECKING:  # at run time, these imports come after START and count as start-up
    from benchmarks.sizes import Sizes

START = time.perf_counter()


def ours(sizes: "Sizes") -> dict[str, float]:
    """Our first step, with the compilation cache that the environment names."""
    with quick_imports():
        import jax

        from benchmarks import ours, train_step
        from empssl_jax.runtime import compilation, memory
        from empssl_jax.runtime.devices import device_mesh

    memory.keep_freed_memory()
    compilation.keep_compiled_programs()
    config, mesh = ours.make_config(sizes, sizes.patch_size), device_mesh(1)
    arguments = train_step.step_arguments(config, mesh)
    step = train_step.trace_step(config, mesh, arguments)
    start = time.perf_counter()
    compiled = step.lower().compile()
    seconds = time.perf_counter() - start
    jax.block_until_ready(compiled(*arguments))
    device = jax.devices()[0].memory_stats() or {}
    return {"compilation_seconds": seconds, "device_bytes": device.get("peak_bytes_in_use", 0)}


def theirs(sizes: "Sizes") -> dict[str, float]:
    """The baseline's first step."""
    import torch

    from benchmarks import theirs

    theirs.train_step(sizes, sizes.patch_size)()
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"compilation_seconds": 0.0, "device_bytes": device}


def peak_host_bytes() -> int:
    """Peak memory of this process in bytes. `ru_maxrss` would include the process that started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0])


def main(side: str, size: str) -> None:
    """Makes the step and prints its time and memory."""
    from benchmarks import sizes

    measured = {"ours": ours, "theirs": theirs}[side](getattr(sizes, size))
    times = {"seconds": time.perf_counter() - START, "processor_seconds": time.process_time()}
    print(json.dumps({**times, "host_bytes": peak_host_bytes(), **measured}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "CPU")
