"""Imports of many modules, without garbage collections."""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Turns garbage collections off for the imports inside, where they find nothing and take a quarter of the time.

    Later collections, which are frequent while JAX traces, skip what has been imported. Once JAX is imported, this does
    nothing: it would keep the garbage of what has run since.
    """
    if "jax" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
