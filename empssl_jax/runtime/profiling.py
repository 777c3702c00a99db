"""Profiler traces of the train step, for TensorBoard's profile plugin (XProf)."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax

from empssl_jax.config.errors import counted

FIRST_STEP, LAST_STEP = 10, 15  # counted from the start or the resumption; by step 10 everything is compiled

State = TypeVar("State")
Batch = TypeVar("Batch")
Result = TypeVar("Result")


def with_profiler_trace(
    train_step: Callable[[State, Batch], Result], folder: Path, num_steps: int
) -> Callable[[State, Batch], Result]:
    """A train step with the same results that also writes a trace of its calls 10 to 15 into a folder.

    `tensorboard --logdir FOLDER` shows the trace, if the package tensorboard-plugin-profile is installed.

    Args:
        train_step: the step to trace.
        folder: where the trace goes.
        num_steps: number of calls to expect; with too few, there is no trace.
    """
    if num_steps <= LAST_STEP:
        left = counted(num_steps, "step")
        print(f"no trace is written: it would end after {LAST_STEP + 1} steps, and the run has only {left} left")
        return train_step
    calls = 0

    def step(state: State, batch: Batch) -> Result:
        nonlocal calls
        if calls == FIRST_STEP:
            jax.block_until_ready(state)
            jax.profiler.start_trace(folder)
        result = train_step(state, batch)
        if calls == LAST_STEP:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            print(f"wrote a trace of steps {FIRST_STEP} to {LAST_STEP} into {folder}")
        calls += 1
        return result

    return step
