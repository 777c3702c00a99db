"""Where curves are sent besides metrics.jsonl: TensorBoard's event files, and Weights & Biases if asked for."""

import importlib.util
import json
import time
from pathlib import Path
from typing import Protocol, runtime_checkable

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from empssl_jax.config import Config
from empssl_jax.config.errors import UserError
from empssl_jax.run_folder.saved_config import to_json


@runtime_checkable
class Logger(Protocol):
    """Takes named numbers of a step."""

    def add(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class EventFile:
    """TensorBoard's event file, written by the caller's thread: that of tensorboardX would hang on a full disk.

    Steps from `first_step` on that earlier files hold are hidden.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._writer.write_event(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: dict[str, float]) -> None:
        """Writes numbers of a step by their tags."""
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class WandbRun:
    """A run of Weights & Biases, kept below the run's folder.

    A resumed run is another one there, of the same group, so that nothing has to be asked of its server; WANDB_MODE,
    WANDB_PROJECT and the like hold as always.
    """

    def __init__(self, config: Config):
        import wandb

        workdir = Path(config.run.workdir)
        settings = {"dir": str(workdir), "group": workdir.name, "name": workdir.name}
        self._run = wandb.init(config=json.loads(to_json(config)), **settings)
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, values: dict[str, float]) -> None:
        """Logs numbers of a step by their tags."""
        self._run.log(values | {"step": step})

    def close(self) -> None:
        """Waits until everything is handed over."""
        self._run.finish()


def check_wandb(config: Config) -> None:
    """Raises UserError if Weights & Biases is asked for and not installed."""
    if config.run.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError('--wandb needs the package of that name: pip install "empssl_jax[wandb]", or leave it out.')
