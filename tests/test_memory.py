"""Freed memory stays in the process."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from empssl_jax.runtime.memory import keep_freed_memory
keep_freed_memory()
size = int(sys.argv[1])
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * size
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")
@pytest.mark.parametrize(
    ("size", "tunables", "kept"),
    [(100_000_000, "", True), (100_000_000, "glibc.malloc.perturb=0", False), (1_100_000_000, "", False)],
)
def test_a_large_array_takes_its_pages_from_the_kernel_once(size, tunables, kept):
    """100 MB are 24,414 pages of 4 KiB. A gigabyte is not kept; what the user has set about the allocator is."""
    command = [sys.executable, "-c", PROGRAM, str(size)]
    out = subprocess.run(command, env=os.environ | {"GLIBC_TUNABLES": tunables}, check=True, capture_output=True).stdout
    first, *later = map(int, out.split())
    assert first > 20_000
    assert all(faults < 1000 if kept else faults > 20_000 for faults in later)
