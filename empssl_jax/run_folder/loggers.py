"""Loggers of curves, besides metrics.jsonl: TensorBoard's event files and, with --wandb, Weights & Biases."""

import importlib.util
import json
import time
from pathlib import Path
from typing import Protocol, runtime_checkable

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from empssl_jax.config import Config
from empssl_jax.config.errors import UserError, install
from empssl_jax.run_folder.saved_config import to_json


@runtime_checkable
class Logger(Protocol):
    """Records named numbers of each step."""

    def add(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class EventFile:
    """TensorBoard's event file, written in the caller's thread: tensorboardX's own thread would hang on a full disk.

    TensorBoard hides the steps from `first_step` on that earlier files hold.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._writer.write_event(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: dict[str, float]) -> None:
        """Writes the numbers of a step, by tag."""
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class WandbRun:
    """A run of Weights & Biases, with its files in the run's folder.

    A resumed run becomes a new Weights & Biases run in the same group, which needs no query to the server. WANDB_MODE,
    WANDB_PROJECT and its other environment variables apply.
    """

    def __init__(self, config: Config):
        import wandb

        workdir = Path(config.run.workdir)
        settings = {"dir": str(workdir), "group": workdir.name, "name": workdir.name}
        self._run = wandb.init(config=json.loads(to_json(config)), **settings)
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, values: dict[str, float]) -> None:
        """Logs the numbers of a step, by tag."""
        self._run.log(values | {"step": step})

    def close(self) -> None:
        """Finishes the run; waits until all numbers are handed over."""
        self._run.finish()


def check_wandb(config: Config) -> None:
    """Raises UserError if --wandb is given and the package wandb is not installed."""
    if config.run.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(f"--wandb needs the package of that name: {install('wandb')}, or leave it out.")
