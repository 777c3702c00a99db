"""Trains a run from its start or its newest checkpoint, then embeds the images, measures kNN and writes the report."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from empssl_jax.config import Config, RunConfig, training_differences
from empssl_jax.config.errors import UserError, counted, require
from empssl_jax.data.batches import Batch, count_steps, device_batches
from empssl_jax.data.datasets import Datasets, ImageDataset, load_datasets
from empssl_jax.data.folder_images import folder_fingerprints
from empssl_jax.evaluation.evaluate import check_neighbours, have_labels, knn_results, measure_rank
from empssl_jax.evaluation.online_probe import online_probe
from empssl_jax.evaluation.run_embeddings import run_embeddings
from empssl_jax.evaluation.untrained_baseline import measure_untrained
from empssl_jax.method.encoder import EncoderState, with_known_precision
from empssl_jax.method.hyperparameters import Hyperparameters, count_all_steps
from empssl_jax.method.losses import coding_rate_bounds
from empssl_jax.method.train_step import TrainState, create_state, make_train_step
from empssl_jax.report.write_report import try_to_report
from empssl_jax.run_folder import loggers, saved_config
from empssl_jax.run_folder.checkpoints import Checkpoints
from empssl_jax.run_folder.metrics import MetricsWriter
from empssl_jax.run_folder.results import add_results, drop_results, format_table, load_results, recorded
from empssl_jax.run_folder.workdir import locked, storage_errors
from empssl_jax.runtime import interruption, profiling
from empssl_jax.runtime.devices import device_mesh, replicated, to_devices
from empssl_jax.runtime.distributed import first_process_first, is_first_process, step_watchdog


def train(config: Config) -> None:
    """Trains or resumes the run in `config.run.workdir`, then embeds the images and measures kNN.

    On SIGTERM or Ctrl-C, saves a checkpoint and raises SystemExit with 128 + the signal's number.

    Raises:
        UserError: the options do not match the data, the devices, or the run that the folder already holds.
        DivergenceError: the loss, an update or a parameter is NaN or infinite.
        StorageError: the folder can no longer be written to.
    """
    data, model = config.data.with_absolute_folder(), with_known_precision(config.model)
    config = dataclasses.replace(config, data=data, model=model, run=config.run.with_absolute_folders())
    mesh, workdir = device_mesh(), Path(config.run.workdir)
    _check_devices(config, mesh)
    loggers.check_wandb(config)
    with locked(workdir):
        newest = _check_workdir(workdir, config)
        first_step = newest or 0
        interruption.begin_at(first_step)
        datasets = load_datasets(config)
        if newest is not None:
            _check_num_train(workdir, len(datasets.train.labels))
        check_neighbours(config, datasets)
        steps = _count_steps(config, datasets.train, mesh)
        if first_step == 0:  # the steps that are left may be too few, and the run resumes without a trace
            _check_profile(config, steps.last)
        with storage_errors(workdir):
            _complete_run(config, datasets, newest, steps, mesh, workdir)


Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


class Steps(NamedTuple):
    """Numbers of steps."""

    per_epoch: int
    last: int  # in the whole run


def _count_steps(config: Config, dataset: ImageDataset, mesh: Mesh) -> Steps:
    found, least = counted(len(dataset.labels), "training image"), max(2, mesh.size)
    remedy = f"it has {found}, and a step on {counted(mesh.size, 'device')} needs at least {least}, so add images"
    require(len(dataset.labels) >= least, "dataset", config.data.dataset, remedy)
    per_epoch = count_steps(dataset, config.training.batch_size)
    return Steps(per_epoch, count_all_steps(per_epoch, config.training.max_epochs))


def _complete_run(
    config: Config, datasets: Datasets, newest: int | None, steps: Steps, mesh: Mesh, workdir: Path
) -> None:
    """Saves the config, measures the untrained baseline, trains, then embeds, measures and reports, as configured."""
    with first_process_first():  # the others must find the same results, or they would not measure the same
        if is_first_process():
            num_train, size, *_ = datasets.train.images.shape
            images = saved_config.SavedImages(size, folder_fingerprints(config.data), num_train)
            _drop_outdated_results(workdir, config, images, newest, steps.last)
            saved_config.save_config(workdir, config)
            saved_config.save_images(workdir, images)
    if config.evaluation.untrained and config.evaluation.valid_patches > 0:
        measure_untrained(config, datasets, mesh, workdir)
    encoder = _fit(config, datasets, steps, mesh, workdir)
    if config.evaluation.valid_patches > 0:
        _measure(config, encoder, steps.last, datasets, mesh, workdir)
    if config.evaluation.report:
        try_to_report(workdir, config, datasets)


def _drop_outdated_results(
    workdir: Path, config: Config, images: saved_config.SavedImages, newest: int | None, last: int
) -> None:
    """Drops results of a run that left no checkpoint, of earlier checkpoints, and of other test images than now."""
    if newest is None:
        drop_results(workdir, lambda result: True, "results of a run that left no checkpoint")
        return
    if newest < last:  # dropped before training, which may be stopped after its last step
        drop_results(workdir, lambda result: result.get("step", last) != last, "results of earlier checkpoints")
    saved, fingerprints = saved_config.load_config(workdir).data, saved_config.load_saved_images(workdir).fingerprints
    now = config.data.test_split, config.data.test_images_per_class, images.fingerprints
    if now != (saved.test_split, saved.test_images_per_class, fingerprints):
        drop_results(workdir, lambda result: "dataset" not in result, "results of other test images")


def _measure(config: Config, encoder: EncoderState, step: int, datasets: Datasets, mesh: Mesh, workdir: Path) -> None:
    """Embeds the images, measures the effective rank and kNN, and adds both to results.json."""
    embeddings = run_embeddings(config, encoder, datasets, mesh, workdir / "embeddings")
    measured = recorded(measure_rank(embeddings), embeddings=config.evaluation.embeddings)
    if have_labels(embeddings):
        measured |= knn_results("kNN", embeddings, config.evaluation, mesh)
    print(format_table(add_results(workdir, recorded(measured, step=step))))


def _check_devices(config: Config, mesh: Mesh) -> None:
    batch_size = config.training.batch_size
    remedy = f"it must be a multiple of the {mesh.size} devices"
    require(batch_size % mesh.size == 0, "batch_size", batch_size, remedy)


def _check_profile(config: Config, last_step: int) -> None:
    """Raises UserError if the whole run is too short for a trace."""
    if config.run.profile:
        has = f"the run has only {counted(last_step, 'step')}"
        remedy = f"the trace ends after {profiling.LAST_STEP + 1} steps and {has}, so leave it out"
        require(last_step > profiling.LAST_STEP, "profile", True, remedy)


def _check_workdir(workdir: Path, config: Config) -> int | None:
    """Returns the step of the newest checkpoint, None if there is none.

    Raises:
        UserError: the folder holds checkpoints of a run with other training options, or a damaged results.json.
    """
    load_results(workdir)  # raises an error for a damaged file before the training
    with Checkpoints(workdir) as store:
        newest = store.latest_step()
    differences = [] if newest is None else _differences(workdir, config)
    if differences:
        raise _another_run(workdir, differences)
    return newest


def _check_num_train(workdir: Path, num_train: int) -> None:
    """Raises UserError if the run in the folder has another number of training images, which sets its steps."""
    before = saved_config.load_saved_images(workdir).num_train
    if before not in (None, num_train):
        raise _another_run(workdir, [f"{counted(num_train, 'training image')} (was {before})"])


def _another_run(workdir: Path, differences: list[str]) -> UserError:
    listed = ", ".join(differences)
    return UserError(f"--workdir {workdir} holds another run: {listed}; give the former values or another folder.")


def _differences(workdir: Path, config: Config) -> list[str]:
    """What differs from the run in the folder and changes what is learned. Where a folder of images is does not."""
    saved = saved_config.load_config(workdir)
    data, recorded = saved.data.with_absolute_folder(), saved_config.load_saved_images(workdir).fingerprints
    changed = []
    if recorded and None not in (data.folder, config.data.folder):
        if folder_fingerprints(config.data).get("train") == recorded.get("train"):
            data = dataclasses.replace(data, dataset=config.data.dataset)
        elif data.dataset == config.data.dataset:
            changed = [f"the training images in {data.folder} have changed"]
    return [*changed, *training_differences(config, dataclasses.replace(saved, data=data))]


def _fit(config: Config, datasets: Datasets, steps: Steps, mesh: Mesh, workdir: Path) -> EncoderState:
    """Runs the remaining steps and returns the trained encoder. On a stop signal, saves and raises SystemExit."""
    hyperparameters = to_devices(Hyperparameters.of(config.training, steps.per_epoch), replicated(mesh))
    train_step: Step = functools.partial(make_train_step(config, mesh), hyperparameters)
    probe = online_probe(config, datasets, steps.last, mesh)
    with Checkpoints(workdir, config.run.max_to_keep) as store, interruption.stop_requests() as stop_signal:
        first_step, state = _initial_state(config, hyperparameters, store, mesh)
        if first_step:
            print(f"resuming {workdir} at step {first_step} of {steps.last}")
        if config.run.profile and is_first_process():
            train_step = profiling.with_profiler_trace(train_step, workdir / "profile", steps.last - first_step)
        batches = device_batches(datasets.train, config.training, first_step, steps.last, mesh)

        def after_step(steps_done: int, state: TrainState, writer: MetricsWriter) -> bool:
            """Probes and saves when due; returns whether to continue."""
            store.check()
            probe(steps_done, state.encoder, writer)
            stop = stop_signal(steps_done) is not None
            if stop or _checkpoint_is_due(config.run, steps_done, steps):
                store.save(steps_done, state.encoder, state.optimizer, loss=writer.flush())
            return not stop

        with _metrics_writer(config, workdir, first_step, steps.last) as writer:
            timeout = config.distributed.step_timeout
            state = _run_steps(train_step, first_step, state, batches, writer, after_step, timeout)
        store.wait()
        if signal := stop_signal(int(state.step)):
            print(f"stopped and saved at step {int(state.step)} of {steps.last}: the same command resumes there")
            raise SystemExit(128 + signal)
    return state.encoder


def _run_steps(
    train_step: Step,
    first_step: int,
    state: TrainState,
    batches: Iterator[Batch],
    writer: MetricsWriter,
    after_step: Callable[[int, TrainState, MetricsWriter], bool],
    timeout: float,
) -> TrainState:
    """Trains on each batch until none is left or `after_step` returns False."""
    with step_watchdog(timeout) as step_done:
        for step, batch in enumerate(batches, start=first_step):
            state, metrics = train_step(state, batch)
            writer.add(step, metrics)
            if step > first_step:
                step_done()  # the previous step, which the writer has waited for
            if not after_step(step + 1, state, writer):
                break
    return state


def _checkpoint_is_due(config: RunConfig, steps_done: int, steps: Steps) -> bool:
    """Whether to save now: every `checkpoint_every` steps, by default those of an epoch, and at the end."""
    return steps_done % (config.checkpoint_every or steps.per_epoch) == 0 or steps_done == steps.last


def _metrics_writer(config: Config, workdir: Path, first_step: int, last_step: int) -> MetricsWriter:
    training = config.training
    bounds = coding_rate_bounds(training.batch_size, config.model.projection_dim, training.coding_rate_eps)
    patches_per_step = training.batch_size * config.patches.train_patches
    extra_loggers = [loggers.WandbRun(config)] if config.run.wandb and is_first_process() else []
    return MetricsWriter(workdir, first_step, last_step, patches_per_step, bounds, extra_loggers)


def _initial_state(
    config: Config, hyperparameters: Hyperparameters, store: Checkpoints, mesh: Mesh
) -> tuple[int, TrainState]:
    """The step and state of the newest checkpoint, or 0 and a fresh state, which need not be computed yet."""
    if store.latest_step() is None:
        return 0, create_state(config.model, hyperparameters, mesh)
    template, sharding = create_state.eval_shape(config.model, hyperparameters, mesh), replicated(mesh)
    step, encoder, optimizer_state = store.restore(template.encoder, template.optimizer, sharding, "latest")
    store.set_aside_after(step)
    return step, TrainState(to_devices(np.array(step, np.int32), sharding), encoder, optimizer_state)
