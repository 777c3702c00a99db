"""A run: the steps from its first or its newest checkpoint to the last, then embeddings and kNN."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from empssl_jax.config import Config, RunConfig, training_differences
from empssl_jax.config.errors import UserError, require
from empssl_jax.data import datasets as data
from empssl_jax.evaluation import evaluate as evaluation
from empssl_jax.evaluation.online_probe import online_probe
from empssl_jax.evaluation.untrained_baseline import measure_untrained
from empssl_jax.method.encoder import EncoderState, default_precision
from empssl_jax.method.losses import coding_rate_bounds
from empssl_jax.method.train_step import (
    TrainState,
    create_state,
    learning_rate_schedule,
    make_optimizer,
    make_train_step,
)
from empssl_jax.report import try_to_report
from empssl_jax.run_folder import loggers, saved_config
from empssl_jax.run_folder.checkpoints import Checkpoints
from empssl_jax.run_folder.metrics import MetricsWriter
from empssl_jax.run_folder.results import add_results, format_table, load_results, of_embeddings
from empssl_jax.run_folder.workdir import claimed, storage_errors
from empssl_jax.runtime import interruption, profiling
from empssl_jax.runtime.distributed import is_first_process, step_watchdog


def train(config: Config) -> None:
    """Trains, or goes on training, the run in `config.run.workdir`, then embeds and measures.

    SIGTERM and Ctrl-C save a checkpoint and raise SystemExit with 128 + the signal's number.

    Raises:
        UserError: the options do not fit the data, the devices, or the run that is in the folder.
        DivergenceError: the loss, an update or a parameter became NaN or infinite.
        StorageError: the folder cannot be written to any more.
    """
    if config.model.precision == "auto":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, precision=default_precision()))
    mesh, workdir = data.device_mesh(), Path(config.run.workdir)
    _check_devices(config, mesh)
    loggers.check_wandb(config)
    with claimed(workdir):
        first_step = _check_workdir(workdir, config)
        interruption.begin_at(first_step)
        datasets = evaluation.load_datasets(config)
        steps_per_epoch = data.count_steps(datasets["train"], config.training.batch_size)
        last_step = steps_per_epoch * config.training.max_epochs
        require(last_step < 2**31, "max_epochs", config.training.max_epochs, "those are more than 2147483647 steps")
        _check_profile(config, last_step - first_step)
        with storage_errors(workdir):
            _train(config, datasets, mesh, workdir)


def _train(config: Config, datasets: evaluation.Datasets, mesh: Mesh, workdir: Path) -> None:
    if is_first_process():
        saved_config.save_config(workdir, config)
        saved_config.save_image_size(workdir, datasets["train"].images.shape[1])
    if config.evaluation.untrained and config.evaluation.valid_patches > 0:
        measure_untrained(config, datasets, mesh, workdir)
    encoder = _fit(config, datasets, mesh, workdir)
    if config.evaluation.valid_patches > 0:
        embeddings = evaluation.embed_and_save(config, encoder, datasets, mesh, workdir)
        if evaluation.have_labels(embeddings):
            knn = {"kNN": evaluation.measure_knn(embeddings, config.evaluation, mesh)}
            print(format_table(add_results(workdir, of_embeddings(config.evaluation.embeddings, knn))))
    if config.evaluation.report:
        try_to_report(workdir, config, datasets)


def _check_devices(config: Config, mesh: Mesh) -> None:
    batch_size = config.training.batch_size
    remedy = f"it must be a multiple of the {mesh.size} devices"
    require(batch_size % mesh.size == 0, "batch_size", batch_size, remedy)


def _check_profile(config: Config, steps_left: int) -> None:
    if config.run.profile:
        remedy = f"the trace ends after {profiling.LAST_STEP + 1} steps and only {steps_left} are left, so leave it out"
        require(steps_left > profiling.LAST_STEP, "profile", True, remedy)


def _check_workdir(workdir: Path, config: Config) -> int:
    """Refuses a folder with checkpoints of a run that learns something else.

    Returns the step that training starts or resumes at.
    """
    load_results(workdir)  # refuses a damaged file now rather than after the training
    with Checkpoints(workdir) as store:
        newest = store.latest_step()
    differences = [] if newest is None else training_differences(config, saved_config.load_config(workdir))
    if differences:
        listed = ", ".join(differences)
        raise UserError(f"--workdir {workdir} holds another run: {listed}; give those values or another folder.")
    return newest or 0


def _fit(config: Config, datasets: evaluation.Datasets, mesh: Mesh, workdir: Path) -> EncoderState:
    """Runs the steps that are left of the run and returns the trained encoder."""
    dataset = datasets["train"]
    steps_per_epoch = data.count_steps(dataset, config.training.batch_size)
    last_step = steps_per_epoch * config.training.max_epochs
    schedule = learning_rate_schedule(config.training, steps_per_epoch)
    optimizer = make_optimizer(config.training, schedule)
    train_step = make_train_step(config, optimizer, schedule, steps_per_epoch, mesh)
    probe = online_probe(config, datasets, last_step, mesh)
    with Checkpoints(workdir, config.run.max_to_keep) as store, interruption.stop_requests() as stop_signal:
        state = _initial_state(config, optimizer, store, mesh)
        first_step = int(state.step)
        if first_step:
            print(f"resuming {workdir} at step {first_step} of {last_step}")
        if config.run.profile and is_first_process():
            train_step = profiling.traced(train_step, workdir / "profile")
        batches = data.placed_batches(dataset, config.training, first_step, last_step, mesh)
        watchdog = step_watchdog(config.distributed.step_timeout)
        with _metrics_writer(config, workdir, first_step, last_step) as writer, watchdog as step_done:
            for step, batch in enumerate(batches, start=first_step):
                state, metrics = train_step(state, batch)
                writer.add(step, metrics)
                store.check()
                if step > first_step:
                    step_done()  # the one before, which the writer has waited for
                probe(step + 1, state.encoder, writer)
                stop = stop_signal(step + 1) is not None
                if _checkpoint_is_due(config.run, step + 1, steps_per_epoch) or stop:
                    store.save(step + 1, state.encoder, state.optimizer, loss=writer.flush())
                if stop:
                    break
        store.wait()
        if signal := stop_signal(int(state.step)):
            print(f"stopped and saved at step {int(state.step)} of {last_step}: the same command resumes there")
            raise SystemExit(128 + signal)
    return state.encoder


def _checkpoint_is_due(config: RunConfig, steps_done: int, steps_per_epoch: int) -> bool:
    """At the end of each epoch and every `checkpoint_every` steps."""
    return steps_done % (config.checkpoint_every or steps_per_epoch) == 0 or steps_done % steps_per_epoch == 0


def _metrics_writer(config: Config, workdir: Path, first_step: int, last_step: int) -> MetricsWriter:
    training = config.training
    bounds = coding_rate_bounds(training.batch_size, config.model.projection_dim, training.coding_rate_eps)
    patches_per_step = training.batch_size * config.patches.train_patches
    others = [loggers.WandbRun(config)] if config.run.wandb and is_first_process() else []
    return MetricsWriter(workdir, first_step, last_step, patches_per_step, bounds, others)


def _initial_state(config: Config, optimizer, store: Checkpoints, mesh: Mesh) -> TrainState:
    """The newest checkpoint's state, or a fresh one."""
    create = functools.partial(create_state, config, optimizer)
    sharding = data.replicated(mesh)
    if store.latest_step() is None:
        return jax.jit(create, out_shardings=sharding)()
    template = jax.eval_shape(create)
    step, encoder, optimizer_state = store.restore(template.encoder, template.optimizer, sharding, "latest")
    store.set_aside_after(step)
    return TrainState(data.place(np.array(step, np.int32), sharding), encoder, optimizer_state)
