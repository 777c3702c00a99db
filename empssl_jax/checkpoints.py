"""Checkpoints of a run by Orbax: the encoder, the optimizer, and beside them the config as JSON."""

from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from orbax.checkpoint.checkpoint_managers import preservation_policy

from empssl_jax.config import Config, RunConfig, UserError, from_json, to_json
from empssl_jax.models import EncoderState

CONFIG_FILE = "config.json"
Which = int | Literal["latest", "best"]


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the saves under way.

    Args:
        workdir: folder of the run; gets checkpoints/.
        max_to_keep: newest checkpoints to keep, besides the one with the lowest loss.
    """

    def __init__(self, workdir: Path, max_to_keep: int = RunConfig.max_to_keep):
        policies = [
            preservation_policy.LatestN(max_to_keep),
            preservation_policy.BestN(get_metric_fn=_negative_loss, n=1),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies), best_fn=_negative_loss
        )
        self._folder = workdir.absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, encoder: EncoderState, optimizer: Any, loss: float) -> None:
        """Starts saving in the background; raises here what made the save before fail."""
        if step not in self._manager.all_steps():
            items = ocp.args.Composite(
                encoder=ocp.args.StandardSave(encoder), optimizer=ocp.args.StandardSave(optimizer)
            )
            self._manager.save(step, args=items, metrics={"loss": loss})

    def wait(self) -> None:
        """Returns when all saves are on disk; raises what made one fail."""
        self._manager.wait_until_finished()

    def restore_encoder(self, template: EncoderState, sharding: Sharding, which: Which) -> tuple[int, EncoderState]:
        """The step and encoder of a checkpoint, see `restore`."""
        step, items = self._restore(which, sharding, encoder=template)
        return step, items.encoder

    def restore(
        self, encoder: EncoderState, optimizer: Any, sharding: Sharding, which: Which
    ) -> tuple[int, EncoderState, Any]:
        """The step, encoder and optimizer state of a checkpoint.

        Args:
            encoder: shapes and types, as `jax.eval_shape` makes them.
            optimizer: the same.
            sharding: where the arrays go.
            which: a step, or the newest, or the one with the lowest loss.

        Raises:
            UserError: there is no such checkpoint, or it is damaged or of another model.
        """
        step, items = self._restore(which, sharding, encoder=encoder, optimizer=optimizer)
        return step, items.encoder, items.optimizer

    def _restore(self, which: Which, sharding: Sharding, **templates: Any) -> tuple[int, Any]:
        step = self._find(which)
        items = {
            name: ocp.args.StandardRestore(
                jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), template)
            )
            for name, template in templates.items()
        }
        try:
            return step, self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax, TensorStore and the file system each raise their own
            reason = str(error).strip().split("\n")[0][:200]
            raise UserError(
                f"Checkpoint {step} in {self._folder} cannot be restored ({reason}): delete the folder {step} there "
                "to use the checkpoint before it."
            ) from error

    def _find(self, which: Which) -> int:
        steps = self._manager.all_steps()
        if not steps:
            raise UserError(f"{self._folder} holds no checkpoint: train first, or give the --workdir of a trained run.")
        if which == "latest":
            return max(steps)
        if which == "best":
            return self._manager.best_step() or max(steps)
        if which not in steps:
            raise UserError(f"--step is {which}: {self._folder} has {', '.join(map(str, sorted(steps)))}.")
        return which


def save_config(workdir: Path, config: Config) -> None:
    """Writes the config of a run into its folder."""
    (workdir / CONFIG_FILE).write_text(to_json(config))


def load_config(workdir: Path) -> Config:
    """The config of a run; raises UserError if the folder is not that of a run."""
    path = workdir / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"--workdir {workdir} has no {CONFIG_FILE}: give the folder of a run of train.py.")
    return from_json(path.read_text(), path)


def _negative_loss(metrics: dict[str, float]) -> float:
    return -metrics["loss"]
