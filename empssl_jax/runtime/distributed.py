"""Several processes that work as one: how they join, which one prints, and how they end if one of them is lost.

Every process runs the same program on the same folder, which all must see. Each has its share of the devices, and
therefore of the images. Parameters and results are the same in all processes.
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
COLLECTIVES = ("gloo", "nccl")  # libraries whose errors mean that another process is gone


@contextlib.contextmanager
def processes(config: DistributedConfig) -> Iterator[None]:
    """Joins the other processes of the job, if there are any; only the first one prints.

    A process that loses another one exits with code 75, or JAX aborts it (134) if JAX notices first.

    Raises:
        UserError: JAX recognises a cluster but cannot join it, or is already in use and cannot look for one.
    """
    _join(config)
    silence = contextlib.nullcontext() if is_first_process() else contextlib.redirect_stdout(None)
    try:
        with silence:
            yield
    except Exception as error:
        if jax.process_count() > 1 and (collective := _error_of_collective(error)):
            _end(f"lost another process ({_first_line(collective)})")
        raise


def _error_of_collective(error: BaseException | None) -> BaseException | None:
    """The error itself or the one that caused it, if a collective operation raised it; else None.

    JAX raises a ValueError or a JaxRuntimeError. The user's errors and those of files may name a folder like runs/nccl.
    """
    while isinstance(error, UserError | OSError):
        error = error.__cause__
    return error if any(name in str(error).lower() for name in COLLECTIVES) else None


def is_first_process() -> bool:
    """Whether this is the process that prints and writes files."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Lets the other processes enter only after the first one has left, for example to download data once."""
    if not is_first_process():
        multihost_utils.sync_global_devices("after the first process")
    try:
        yield
    finally:  # also after an error, or the others would wait for ever
        if is_first_process() and jax.process_count() > 1:
            multihost_utils.sync_global_devices("after the first process")


@contextlib.contextmanager
def step_watchdog(timeout: float) -> Iterator[Callable[[], None]]:
    """Yields a function to call after each training step; ends this process if the next step takes too long.

    JAX notices processes that have ended or been stopped, but not those that still send heartbeats and never reach the
    next collective operation. Watching begins with the first call, so compilation may take any time. A single process
    is not watched, since it waits for no other.

    Args:
        timeout: seconds allowed from one call to the next.
    """
    deadline = math.inf
    finished = threading.Event()

    def step_done() -> None:
        nonlocal deadline
        deadline = time.monotonic() + timeout

    def watch() -> None:
        while not finished.wait(1.0):
            if time.monotonic() > deadline:
                _end(f"has finished no step for {timeout:g} seconds (--step-timeout): another process hangs")

    if jax.process_count() > 1:
        threading.Thread(target=watch, name="step watchdog", daemon=True).start()
    try:
        yield step_done
    finally:
        finished.set()


def _join(config: DistributedConfig) -> None:
    """Starts JAX's distributed runtime if the options name a coordinator, or else if JAX recognises a cluster."""
    # The timeout also limits how long processes wait for each other at the end: one that fails must not hold up others.
    initialize = functools.partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=config.heartbeat_timeout,
        shutdown_timeout_seconds=config.heartbeat_timeout,
    )
    if config.coordinator is not None:
        address = (config.coordinator, config.num_processes, config.process_id)
        print("process {2} of {1} joins the others at {0}".format(*address), file=sys.stderr, flush=True)
        initialize(*address, cluster_detection_method="deactivate")
    elif config.num_processes is None:
        try:
            initialize()
        except Exception as error:  # its class depends on the kind of cluster
            # This error means that JAX has found no cluster. It has then started nothing.
            if isinstance(error, ValueError) and "coordinator_address" in str(error):
                return
            if "must be called before" in str(error):
                raise UserError(
                    "--num-processes is not given, and this process has already used JAX, which then cannot look for a "
                    "cluster: run the command in a process of its own, or give --num-processes 1."
                ) from error
            raise UserError(
                f"JAX recognises a cluster here but cannot join it ({_first_line(error)}): give --coordinator, "
                "--num-processes and --process-id, or --num-processes 1 to run alone."
            ) from error


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0]


def _end(reason: str) -> None:
    """Prints the reason and ends this process at once: an orderly exit would wait for the lost process."""
    print(
        f"error: process {jax.process_index()} of {jax.process_count()} {reason}. Start all processes again with the "
        "same command: training resumes from its last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(LOST)
