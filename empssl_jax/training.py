"""The train state, the train step, and the loop around it."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from empssl_jax import batch_norm, checkpoints, data, evaluation, interruption, loggers, profiling
from empssl_jax.checkpoints import Checkpoints
from empssl_jax.checks import UserError, require
from empssl_jax.config import Config, RunConfig, TrainingConfig, training_differences
from empssl_jax.distributed import is_first_process, step_watchdog
from empssl_jax.keys import parameters_key, training_patches_key
from empssl_jax.lars import lars
from empssl_jax.losses import coding_rate_bounds, emp_ssl_loss, normalise
from empssl_jax.metrics import MetricsWriter
from empssl_jax.models import EncoderState, default_precision, encoder_graph, encoder_state, init_encoder, is_layer
from empssl_jax.patches import multi_patch
from empssl_jax.probe import online_probe
from empssl_jax.reductions import norm_pair
from empssl_jax.report import try_to_report
from empssl_jax.workdir import claimed, storage_errors

STATISTICS_PASSES = 10  # steps that set BatchNorm's statistics of an untrained encoder


class TrainState(NamedTuple):
    """Everything that training changes."""

    step: Int[Array, ""]  # updates made so far
    encoder: EncoderState
    optimizer: optax.OptState


TrainStep = Callable[[TrainState, data.Batch], tuple[TrainState, dict[str, Array]]]


def learning_rate_schedule(config: TrainingConfig, steps_per_epoch: int) -> optax.Schedule:
    """From the learning rate to 0 along a half cosine over all steps, after a linear rise if there is a warm-up.

    The rise begins above 0: there LARS's clipping would let the whole gradient into its momentum, and the next steps,
    at a higher rate, would make the encoder collapse.
    """
    last_step = config.max_epochs * steps_per_epoch
    warmup_steps = min(round(config.warmup_epochs * steps_per_epoch), last_step - 1)
    cosine_steps = last_step - warmup_steps
    cosine = optax.cosine_decay_schedule(config.learning_rate, cosine_steps)
    rise = optax.linear_schedule(config.learning_rate / (warmup_steps + 1), config.learning_rate, warmup_steps)
    return optax.join_schedules([rise, cosine], [warmup_steps]) if warmup_steps else cosine


def make_optimizer(config: TrainingConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """LARS as the config has it."""
    return lars(schedule, config.weight_decay, momentum=config.momentum, trust_coefficient=config.trust_coefficient)


def create_state(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    encoder = init_encoder(config.model, parameters_key(config.training.seed))
    return TrainState(jnp.zeros([], jnp.int32), encoder, optimizer.init(encoder.params))


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation, schedule: optax.Schedule, steps_per_epoch: int, mesh: Mesh
) -> TrainStep:
    """The compiled step (state, batch) -> (state, metrics), data parallel over the devices of the mesh.

    It is `jax.jit(jax.shard_map(...))`, which is what `jax.pmap` has become: each device augments and encodes its
    share of the images; BatchNorm shares its statistics; the devices exchange projections, so that the coding rate and
    its gradient are those of the whole batch. The result does not depend on the number of devices. The state is
    donated: the caller's copy is gone.
    """
    graph = encoder_graph(config.model, data.DATA_AXIS, config.run.remat)

    def summed_in_float32(node):
        """Makes shard_map sum a layer's gradients over the devices here, not in the precision of the layer."""
        return jax.lax.pcast(node, data.DATA_AXIS, to="varying") if is_layer(node) else node

    def loss_fn(params, batch_stats, patches):
        num_images, num_patches = patches.shape[:2]
        encoder = nnx.merge(graph, jax.tree.map(summed_in_float32, params, is_leaf=is_layer), batch_stats)
        encoder.train()
        _, projections = encoder(patches.reshape(-1, *patches.shape[2:]))
        by_patch = jnp.swapaxes(normalise(projections).reshape(num_images, num_patches, -1), 0, 1)
        loss = emp_ssl_loss(
            by_patch, config.training.invariance_coefficient, config.training.coding_rate_eps, data.DATA_AXIS
        )
        return loss.total, (loss, encoder_state(encoder).batch_stats)

    def step(state: TrainState, batch: data.Batch) -> tuple[TrainState, dict[str, Array]]:
        patches = multi_patch(
            training_patches_key(config.training.seed, state.step // steps_per_epoch),
            batch.images,
            config.patches.train_patches,
            indices=batch.indices,
            **config.patches.crops,
        )
        gradients, (loss, batch_stats) = jax.grad(loss_fn, has_aux=True)(*state.encoder, patches)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.encoder.params)
        encoder = EncoderState(optax.apply_updates(state.encoder.params, updates), batch_stats)
        update_norm, parameter_norm = norm_pair(updates, encoder.params)
        metrics = {
            "loss": loss.total,
            "coding_rate": loss.coding_rate,
            "similarity": loss.similarity,
            "learning_rate": schedule(state.step),
            "update_norm": update_norm,
            "parameter_norm": parameter_norm,
        }
        return TrainState(state.step + 1, encoder, optimizer_state), metrics

    whole, split = PartitionSpec(), PartitionSpec(data.DATA_AXIS)
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(whole, split), out_specs=whole), donate_argnums=0)


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
        checkpoints.save_config(workdir, config)
        checkpoints.save_image_size(workdir, datasets["train"].images.shape[1])
    if config.evaluation.untrained and config.evaluation.valid_patches > 0:
        _measure_untrained(config, datasets, mesh, workdir)
    encoder = _fit(config, datasets, mesh, workdir)
    if config.evaluation.valid_patches > 0:
        embeddings = evaluation.embed_and_save(config, encoder, datasets, mesh, workdir)
        if evaluation.have_labels(embeddings):
            knn = {"kNN": evaluation.measure_knn(embeddings, config.evaluation, mesh)}
            print(evaluation.format_table(evaluation.add_results(workdir, knn, config.evaluation.embeddings)))
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
    evaluation.load_results(workdir)  # refuses a damaged file now rather than after the training
    with Checkpoints(workdir) as store:
        newest = store.latest_step()
    differences = [] if newest is None else training_differences(config, checkpoints.load_config(workdir))
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
        watchdog = step_watchdog(config.distributed.step_timeout)
        with _metrics_writer(config, workdir, first_step, last_step) as writer, watchdog as step_done:
            for step, batch in _placed_batches(config, dataset, first_step, last_step, mesh):
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


def _placed_batches(
    config: Config, dataset, first_step: int, last_step: int, mesh: Mesh
) -> Iterator[tuple[int, data.Batch]]:
    """The steps and their batches, on the devices."""
    batch_size = config.training.batch_size
    rows = data.own_rows(mesh, batch_size)
    batches = data.batches(dataset, batch_size, config.training.seed, first_step, last_step, rows)
    for step, batch in enumerate(batches, start=first_step):
        yield step, data.Batch(*(data.place_rows(own, mesh, batch_size) for own in batch))


def _measure_untrained(config: Config, datasets: evaluation.Datasets, mesh: Mesh, workdir: Path) -> None:
    """Measures kNN with the initial parameters, for comparison, and writes it into results.json.

    No handicap: BatchNorm gets the statistics of real batches of training patches, from steps whose optimizer changes
    nothing. They start at mean 0 and variance 1 and keep a share of themselves in each pass; the share of that start is
    taken out again.
    """
    name = "kNN before training"
    if name in evaluation.load_results(workdir):
        return
    dataset = datasets["train"]
    steps_per_epoch = data.count_steps(dataset, config.training.batch_size)
    nothing = optax.set_to_zero()
    step = make_train_step(config, nothing, optax.constant_schedule(0.0), steps_per_epoch, mesh)
    state = jax.jit(functools.partial(create_state, config, nothing), out_shardings=data.replicated(mesh))()
    start = jax.tree.map(jnp.copy, state.encoder.batch_stats)
    for _, batch in _placed_batches(config, dataset, 0, STATISTICS_PASSES, mesh):
        state, _ = step(state, batch)
    kept = batch_norm.MOMENTUM**STATISTICS_PASSES
    batch_stats = jax.tree.map(lambda now, first: (now - kept * first) / (1 - kept), state.encoder.batch_stats, start)
    embeddings = evaluation.embed_splits(config, EncoderState(state.encoder.params, batch_stats), datasets, mesh)
    if evaluation.have_labels(embeddings):
        knn = {name: evaluation.measure_knn(embeddings, config.evaluation, mesh)}
        evaluation.add_results(workdir, knn, config.evaluation.embeddings)
