"""Freed memory stays in the process."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from empssl_jax.runtime.memory import keep_freed_memory
keep_freed_memory()
size = 100_000_000
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * size
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")
@pytest.mark.parametrize("tunables", ["", "glibc.malloc.perturb=0"])
def test_a_large_array_takes_its_pages_from_the_kernel_once(tunables):
    """100 MB are 24,414 pages of 4 KiB; what the user has set about the allocator is kept."""
    command = [sys.executable, "-c", PROGRAM]
    out = subprocess.run(command, env=os.environ | {"GLIBC_TUNABLES": tunables}, check=True, capture_output=True).stdout
    first, *later = map(int, out.split())
    assert first > 20_000
    assert all(faults > 20_000 if tunables else faults < 1000 for faults in later)
