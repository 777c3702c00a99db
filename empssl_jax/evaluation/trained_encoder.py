"""Restores the encoder of a run from a checkpoint."""

from pathlib import Path
from typing import NamedTuple

from empssl_jax.config import Config
from empssl_jax.config.command_options import CheckpointChoice
from empssl_jax.method.encoder import EncoderState, encoder_template
from empssl_jax.run_folder.checkpoints import Checkpoints
from empssl_jax.run_folder.saved_config import load_config
from empssl_jax.runtime.devices import device_mesh, replicated


class TrainedEncoder(NamedTuple):
    """An encoder and the run it comes from."""

    config: Config
    state: EncoderState  # replicated over all devices
    step: int  # of the checkpoint


def restore_encoder(folder: Path, choice: CheckpointChoice, argument: str = "--workdir") -> TrainedEncoder:
    """Restores the encoder of a run, which may still be training; nothing is written to its folder.

    Args:
        folder: folder of the run.
        choice: checkpoint to restore: its step, the newest ("latest"), or the one with the lowest loss ("best").
        argument: what named the folder, for the error message.

    Raises:
        UserError: the run or the checkpoint does not exist, or is damaged.
    """
    config = load_config(folder, argument)
    with Checkpoints(folder, read_only=True) as checkpoints:
        template, sharding = encoder_template(config.model), replicated(device_mesh())
        step, state = checkpoints.restore_encoder(template, sharding, choice)
    return TrainedEncoder(config, state, step)
