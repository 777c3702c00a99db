"""Checkpoints of a run, saved by Orbax; every restored array is verified against a digest."""

import contextlib
import gc
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from jaxtyping import PyTree

from empssl_jax.config import RunConfig
from empssl_jax.config.command_options import CheckpointChoice
from empssl_jax.config.errors import DivergenceError, StorageError, UserError
from empssl_jax.run_folder.digests import array_digests, first_not_finite, is_sealed, seal
from empssl_jax.runtime.distributed import first_process_first, is_first_process


class _DamagedError(Exception):
    """A checkpoint is incomplete or differs from what was saved."""


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for unfinished saves on exit.

    Each holds the encoder, the optimizer, and a record: the loss and a digest of every array. Neither Orbax nor the
    file system notices flipped bits, and a missing chunk of an array reads as zeros; the digests detect both.

    Args:
        workdir: folder of the run; checkpoints go into its subfolder checkpoints/.
        max_to_keep: newest checkpoints to keep, besides the one with the lowest loss.
        read_only: change nothing in the folder, since another process may be using it.

    Raises:
        UserError: the folder cannot be used.
    """

    def __init__(self, workdir: Path, max_to_keep: int = RunConfig.max_to_keep, read_only: bool = False):
        self._workdir = workdir
        self._folder = workdir.absolute() / "checkpoints"
        self._losses: dict[int, float] = {}
        self._max_to_keep = max_to_keep
        # Orbax removes the unfinished saves of a killed process, unless the folder is read-only.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self, cleanup_tmp_directories=not read_only, create=not read_only
        )
        try:
            if not read_only:
                # Orbax would notice a file of this name only when saving.
                self._folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self._folder} cannot be used as a folder of checkpoints ({_reason(error)}): give another --workdir."
            ) from error
        for step in self._manager.all_steps():
            try:
                self._losses[step] = self._read_record(step)["loss"]
            except _DamagedError:
                continue  # reported when it is restored

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            with self._storage_errors():
                self._manager.close()
        except StorageError:
            if exception[0] is None:  # an earlier exception matters more
                raise

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        """Orbax's PreservationPolicy: keeps the newest checkpoints and the best."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self._max_to_keep :], self._best(steps)}
        return [step in kept for step in steps]

    def steps(self) -> list[int]:
        """Steps of all checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, encoder: PyTree, optimizer: Any, loss: float) -> None:
        """Starts a save in the background; does nothing if the step is already saved.

        Raises:
            DivergenceError: an array is not finite.
            StorageError: this save or the previous one failed.
        """
        saved = self._manager.all_steps()
        if step in saved:
            return
        items = {"encoder": encoder, "optimizer": optimizer}
        digests = array_digests(items)  # first, as its threads copy the arrays to the host
        if (path := first_not_finite(items)) is not None:
            raise DivergenceError(
                f"Step {step - 1} has made {path} not finite: any checkpoint before it is kept; try a lower "
                "--learning-rate in another --workdir."
            )
        self._losses = {step: loss} | {old: self._losses[old] for old in saved if old in self._losses}
        record = seal({"loss": loss, "digests": digests})
        saves = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        if not self._folder.is_dir():
            raise self._storage_error("the folder is gone")
        gc.collect()  # Orbax leaves reference cycles that would keep the previously saved state in memory
        with self._storage_errors():
            self._manager.save(step, args=ocp.args.Composite(**saves, record=ocp.args.JsonSave(record)))

    def check(self) -> None:
        """Raises StorageError now if a save in the background has failed, instead of at the next save."""
        with self._storage_errors():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Waits until all saves are on disk; raises StorageError if one failed."""
        with self._storage_errors():
            self._manager.wait_until_finished()

    def restore_encoder(self, template: PyTree, sharding: Sharding, choice: CheckpointChoice) -> tuple[int, PyTree]:
        """The step and encoder of a checkpoint, see `restore`."""
        step, items = self._restore(choice, sharding, encoder=template)
        return step, items["encoder"]

    def restore(
        self, encoder: PyTree, optimizer: Any, sharding: Sharding, choice: CheckpointChoice
    ) -> tuple[int, PyTree, Any]:
        """The step, encoder and optimizer state of a checkpoint, bit-identical to what was saved.

        With the choice "latest", damaged checkpoints are skipped with a warning.

        Args:
            encoder: shapes and types of the encoder's arrays, as `jax.eval_shape` returns them.
            optimizer: shapes and types of the optimizer's arrays.
            sharding: sharding of the restored arrays.
            choice: a step, "latest", or "best" (the lowest loss).

        Raises:
            UserError: there is no such checkpoint, it is damaged, or it is of another model.
        """
        step, items = self._restore(choice, sharding, encoder=encoder, optimizer=optimizer)
        return step, items["encoder"], items["optimizer"]

    def set_aside_after(self, step: int) -> None:
        """Moves newer checkpoints, which `restore` skipped as damaged, to damaged/ in the workdir."""
        with first_process_first():
            for newer in [newer for newer in self._manager.all_steps() if newer > step]:
                if is_first_process():
                    self._set_aside(newer)
                self._losses.pop(newer, None)
        self._manager.reload()

    def _set_aside(self, step: int) -> None:
        target = self._workdir / "damaged" / str(step)
        target.parent.mkdir(exist_ok=True)
        while target.exists():
            target = target.with_name(target.name + "+")
        (self._folder / str(step)).rename(target)

    def _restore(self, choice: CheckpointChoice, sharding: Sharding, **templates: Any) -> tuple[int, dict[str, Any]]:
        steps = self._find(choice)
        for step in steps:
            try:
                return step, self._read(step, sharding, templates)
            except _DamagedError as error:
                print(f"warning: checkpoint {step} in {self._folder} is damaged: {error}", file=sys.stderr)
        tried = ", ".join(map(str, steps))
        raise UserError(
            f"No undamaged checkpoint is left in {self._folder} (tried {tried}): choose another with --step, or "
            "train again in another --workdir."
        )

    def _read(self, step: int, sharding: Sharding, templates: dict[str, Any]) -> dict[str, Any]:
        """The items of a checkpoint; raises _DamagedError if they differ from what was saved."""
        restores = {
            name: ocp.args.StandardRestore(
                jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), template)
            )
            for name, template in templates.items()
        }
        recorded = self._read_record(step)["digests"]
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**restores))
        except Exception as error:  # Orbax, TensorStore and the file system each raise their own errors
            raise _DamagedError(_reason(error)) from error
        items = {name: restored[name] for name in templates}
        for path, digest in array_digests(items).items():
            if digest != recorded.get(path):
                raise _DamagedError(f"{path} differs from what was saved")
        return items

    def _read_record(self, step: int) -> dict[str, Any]:
        try:
            record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record
        except Exception as error:  # Orbax, JSON and the file system each raise their own errors
            raise _DamagedError(_reason(error)) from error
        if not is_sealed(record):
            raise _DamagedError("its record differs from what was saved")
        return record

    def _find(self, choice: CheckpointChoice) -> list[int]:
        """The steps to try, in order."""
        steps = self.steps()[::-1]
        if not steps:
            raise UserError(f"{self._folder} holds no checkpoint: train first, or give the folder of a trained run.")
        if choice == "latest":
            return steps
        if choice == "best":
            return [self._best(steps)]
        if choice not in steps:
            available = ", ".join(map(str, reversed(steps)))
            raise UserError(f"--step is {choice}: {self._folder} has {available}, so give one of these.")
        return [choice]

    def _best(self, steps: Sequence[int]) -> int:
        """The step with the lowest loss, the newest if no loss is known."""
        return min(steps, key=lambda step: (self._losses.get(step, float("inf")), -step))

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax, TensorStore and the file system each raise their own errors
            raise self._storage_error(error) from error

    def _storage_error(self, error: object) -> StorageError:
        return StorageError(
            f"A checkpoint could not be saved in {self._folder} ({_reason(error)}): those before it are kept, and the "
            "same command resumes there once the cause is fixed."
        )


def _reason(error: object) -> str:
    """The first line of an error; if it is long, only its two ends, which name the kind and the cause."""
    line = str(error).strip().split("\n")[0] or type(error).__name__
    return line if len(line) <= 200 else f"{line[:80]} ... {line[-120:]}"
