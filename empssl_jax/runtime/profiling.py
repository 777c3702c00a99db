"""Traces of the train step for TensorBoard's profile plugin (XProf)."""

from pathlib import Path

import jax

FIRST_STEP, LAST_STEP = 10, 15  # counted from the start or the resumption, when everything is compiled


def with_profiler_trace(train_step, folder: Path):
    """A train step that does the same, and leaves a trace of its calls 10 to 15 in a folder.

    `tensorboard --logdir FOLDER` shows it, with the package tensorboard-plugin-profile.
    """
    calls = 0

    def step(state, batch):
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
