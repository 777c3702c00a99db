"""Several processes that work as one: how they meet, which one speaks, and how they end when one of them is lost.

Every process runs the same program on the same folder, which all must see. Each holds its share of the devices, and
with them of the images; parameters and results are the same everywhere.
"""

import contextlib
import functools
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from empssl_jax.config import DistributedConfig
from empssl_jax.config.errors import UserError

LOST = 75  # exit code, EX_TEMPFAIL of sysexits.h: the same command may succeed
COLLECTIVES = ("gloo", "nccl")  # libraries whose failures say that another process is gone


@contextlib.contextmanager
def processes(config: DistributedConfig) -> Iterator[None]:
    """Joins the other processes of the job, if there are any; only the first one prints.

    A process that loses another one ends with exit code 75, or is aborted by JAX (134) where JAX notices first.

    Raises:
        UserError: the processes cannot be found.
    """
    _join(config)
    silence = contextlib.nullcontext() if is_first_process() else contextlib.redirect_stdout(None)
    try:
        with silence:
            yield
    except Exception as error:
        if jax.process_count() > 1 and any(name in str(error).lower() for name in COLLECTIVES):
            _end(f"lost another process ({_first_line(error)})")
        raise


def is_first_process() -> bool:
    """Whether this is the process that prints and writes files."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """What the first process does inside is done before the others enter, as a download."""
    if not is_first_process():
        multihost_utils.sync_global_devices("after the first process")
    yield
    if is_first_process() and jax.process_count() > 1:
        multihost_utils.sync_global_devices("after the first process")


@contextlib.contextmanager
def step_watchdog(timeout: float) -> Iterator[Callable[[], None]]:
    """Yields what the training loop calls when a step is done; ends this process when the next takes too long.

    JAX notices processes that have ended or been stopped, not those that go on breathing but never reach the next
    collective operation. Nothing is watched before the first call, so that compilation may take its time everywhere,
    nor in a single process, which waits for nobody.

    Args:
        timeout: seconds from one call to the next.
    """
    deadline = math.inf
    left = threading.Event()

    def step_done() -> None:
        nonlocal deadline
        deadline = time.monotonic() + timeout

    def watch() -> None:
        while not left.wait(1.0):
            if time.monotonic() > deadline:
                _end(f"has finished no step for {timeout:g} seconds (--step-timeout): another process hangs")

    if jax.process_count() > 1:
        threading.Thread(target=watch, name="step watchdog", daemon=True).start()
    try:
        yield step_done
    finally:
        left.set()


def _join(config: DistributedConfig) -> None:
    """Starts JAX's distributed runtime: by the options, else where JAX recognises a cluster, else not at all."""
    # The processes wait as long for each other at the end: a process that fails alone must not keep the others.
    initialize = functools.partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=config.heartbeat_timeout,
        shutdown_timeout_seconds=config.heartbeat_timeout,
    )
    if config.coordinator is not None:
        address = (config.coordinator, config.num_processes, config.process_id)
        print("process {2} of {1} meets the others at {0}".format(*address), file=sys.stderr, flush=True)
        initialize(*address, cluster_detection_method="deactivate")
    elif config.num_processes is None:
        try:
            initialize()
        except Exception as error:  # each kind of cluster fails in its own way
            # Without arguments JAX looks for a cluster, and has started nothing when it finds none.
            if isinstance(error, ValueError) and "coordinator_address" in str(error):
                return
            raise UserError(
                f"JAX recognises a cluster here but cannot join it ({_first_line(error)}): give --coordinator, "
                "--num-processes and --process-id, or --num-processes 1 to run alone."
            ) from error


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


def _end(what: str) -> None:
    """Ends this process at once: an orderly exit would wait for the process that is lost."""
    print(
        f"error: process {jax.process_index()} of {jax.process_count()} {what}. Start all processes again by the same "
        "command: training resumes at its last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(LOST)
