"""The train step on one and on eight devices, the learning rate schedule, and whether the loss falls."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from empssl_jax.config import Config, DataConfig, ModelConfig, PatchConfig, RunConfig, TrainingConfig
from empssl_jax.data.batches import Batch
from empssl_jax.method import train_step
from empssl_jax.method.encoder import encoder_graph, encoder_state
from empssl_jax.method.hyperparameters import Hyperparameters, learning_rate
from empssl_jax.method.losses import emp_ssl_loss, normalise
from empssl_jax.method.patches import multi_patch
from empssl_jax.method.random_keys import training_patches_key
from empssl_jax.method.train_step import create_state, make_optimizer, make_train_step
from empssl_jax.runtime.devices import device_mesh, replicated, split_images

CONFIG = Config(
    data=DataConfig(dataset="digits"),
    patches=PatchConfig(train_patches=4, patch_size=16),
    model=ModelConfig(width=4, hidden_dim=32, projection_dim=16, precision="float32"),
    training=TrainingConfig(batch_size=16),
)
STEPS_PER_EPOCH = 10


@pytest.fixture(scope="module")
def batches():
    """Random images, because a rounding error can flip the ReLUs of all equal margin pixels of digits together."""
    random = np.random.default_rng(0)
    size = CONFIG.training.batch_size
    return [
        Batch(random.integers(0, 256, (size, 32, 32, 3), np.uint8), np.arange(size, dtype=np.int32) + 100 * step)
        for step in range(3)
    ]


def compiled_step(num_devices: int, config: Config):
    """The step, its hyperparameters, and the mesh."""
    mesh = device_mesh(num_devices)
    hyperparameters = Hyperparameters.of(config.training, STEPS_PER_EPOCH)
    return make_train_step(config, mesh), jax.device_put(hyperparameters, replicated(mesh)), mesh


def run_steps(batches, num_devices: int, config: Config = CONFIG):
    """The final state, and the metrics of each step."""
    step, hyperparameters, mesh = compiled_step(num_devices, config)
    state, metrics = create_state(config.model, hyperparameters, mesh), []
    with jax.transfer_guard("disallow"):
        for batch in batches:
            state, values = step(hyperparameters, state, jax.device_put(batch, split_images(mesh)))
            metrics.append(values)
    return jax.device_get(state), jax.device_get(metrics)


@pytest.fixture(scope="module")
def on_one_device(batches):
    return run_steps(batches, 1)


def test_eight_devices_equal_one(batches, on_one_device):
    """Compares every parameter after one step, and only the metrics of later ones, which amplify rounding errors."""
    (ours, our_metrics), (theirs, their_metrics) = (run_steps(batches[:1], devices) for devices in (1, 8))
    assert_close(our_metrics[0], their_metrics[0])
    assert largest_difference(ours, theirs) < 1e-4
    for ours, theirs in zip(on_one_device[1], run_steps(batches, 8)[1], strict=True):
        assert_close(ours, theirs)


def assert_close(ours, theirs, tolerance=1e-4):
    for name in ours:
        assert ours[name] == pytest.approx(theirs[name], rel=tolerance), name


def largest_difference(ours, theirs) -> float:
    """Between two trees, relative to the largest number of each array."""
    difference = jax.tree.map(lambda a, b: np.max(np.abs(a - b)) / max(np.max(np.abs(a)), 1e-3), ours, theirs)
    return max(jax.tree.leaves(difference))


def test_a_second_step_compiles_nothing_and_counts(batches, on_one_device):
    compiled = []
    listen = jax.monitoring.register_event_duration_secs_listener
    listen(lambda event, duration, **_: compiled.append(event) if "backend_compile" in event else None)
    state, _ = run_steps(batches, 1)
    assert int(state.step) == 3
    assert compiled == []
    jax.jit(lambda x: x + jnp.e)(jnp.ones(3))
    assert compiled, "the listener hears nothing"


def test_the_loss_is_minus_coding_rate_minus_weighted_similarity(on_one_device):
    for values in on_one_device[1]:
        assert values["loss"] == pytest.approx(-values["coding_rate"] - 200 * values["similarity"], rel=1e-5)


def test_steps_follow_the_gradient(batches):
    """On one repeated batch, the loss falls."""
    _, metrics = run_steps([batches[0]] * 6, 1)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[-1]["similarity"] > metrics[0]["similarity"]


@pytest.mark.long
def test_remat_changes_nothing_but_memory(batches):
    """Rematerialisation gives the same metrics and parameters."""
    remat = dataclasses.replace(CONFIG, run=RunConfig(remat=True))
    ours, theirs = run_steps(batches[:1], 1), run_steps(batches[:1], 1, remat)
    assert_close(ours[1][0], theirs[1][0])
    assert largest_difference(ours[0], theirs[0]) < 1e-4


def check_sums_over_devices(program: str):
    """One sum of each kernel's gradient, and no sum in bfloat16."""
    sums = re.findall(r"all_reduce.*?\) : \((.*?)\) ->", program, re.DOTALL)
    kernels = [types for types in sums if re.search(r"<\d+x\d+x\d+x\d+x", types)]
    assert len(sums) > 20
    assert not [types for types in sums if "bf16" in types]
    assert len(kernels) == 20, "the convolutions of a ResNet-18"


def test_gradients_are_summed_over_devices_once_and_in_float32(monkeypatch):
    """With bfloat16 layers and pieces. In a loop, as on accelerators, more pieces make no more program."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, precision="bfloat16"))
    for pieces in (1, 2):
        check_sums_over_devices(lowered_step(8, accumulating(pieces, config)))
    monkeypatch.setattr(train_step, "sequential_map", jax.lax.map)
    config = dataclasses.replace(config, patches=dataclasses.replace(CONFIG.patches, patch_area=0.2502))  # not cached
    two, four = (lowered_step(8, accumulating(pieces, config)) for pieces in (2, 4))
    check_sums_over_devices(two)
    check_sums_over_devices(four)
    assert len(four) == pytest.approx(len(two), rel=0.01)


def lowered_step(num_devices: int, config: Config) -> str:
    """The text of the step's program, which is not compiled."""
    step, hyperparameters, mesh = compiled_step(num_devices, config)
    state = create_state.eval_shape(config.model, hyperparameters, mesh)
    images = np.zeros((CONFIG.training.batch_size, 32, 32, 3), np.uint8)
    batch = jax.device_put(Batch(images, np.zeros(len(images), np.int32)), split_images(mesh))
    return step.lower(hyperparameters, state, batch).as_text()


def accumulating(pieces: int, config: Config) -> Config:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, accumulate=pieces))


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.long)])
def test_pieces_give_the_whole_gradient_of_a_loss_with_batch_norm_by_piece(batches, remat):
    """Two pieces on eight devices. The reference differentiates both together on one device."""
    hyperparameters, mesh = compiled_step(1, CONFIG)[1:]
    start = create_state(CONFIG.model, hyperparameters, mesh)
    images, indices = batches[0]

    def loss(params, batch_stats):
        def project(piece):
            encoder = nnx.merge(encoder_graph(CONFIG.model), params, batch_stats)
            encoder.train()
            _, projections = encoder(piece.reshape(-1, 16, 16, 3))
            return normalise(projections).reshape(16, 2, 16).swapaxes(0, 1), encoder_state(encoder).batch_stats

        # Compiled, as in the step: rounding decides which whole number the hue becomes.
        patches = multi_patch(training_patches_key(CONFIG.training.seed, 0), images, 4, patch_size=16, indices=indices)
        projections, new_stats = jax.vmap(project)(jnp.stack([patches[:, :2], patches[:, 2:]]))
        parts = emp_ssl_loss(projections.reshape(4, 16, 16), 200.0, 0.2)
        return parts.total, (parts, jax.tree.map(lambda pair: (pair[0] + pair[1]) / 2, new_stats))

    @jax.jit
    def reference(start):
        gradients, (parts, batch_stats) = jax.grad(loss, has_aux=True)(*start.encoder)
        updates, _ = make_optimizer(hyperparameters).update(gradients, start.optimizer, start.encoder.params)
        return optax.apply_updates(start.encoder.params, updates), batch_stats, parts

    params, batch_stats, parts = jax.device_get(reference(start))
    config = dataclasses.replace(accumulating(2, CONFIG), run=RunConfig(remat=remat))
    state, (metrics,) = run_steps(batches[:1], 8, config)
    assert_close({"loss": parts.total, "coding_rate": parts.coding_rate, "similarity": parts.similarity}, metrics)
    assert largest_difference(params, state.encoder.params) < 1e-4
    assert largest_difference(batch_stats, state.encoder.batch_stats) < 1e-4
    assert int(state.step) == 1


@pytest.mark.long
def test_pieces_change_nothing_where_their_statistics_are_those_of_the_batch(batches, monkeypatch):
    """If the patches of an image are equal, all pieces have the whole batch's means and biased variances."""

    def equal_patches(key, images, num_patches, *, first_patch, **options):
        return jnp.repeat(multi_patch(key, images, 1, **options), num_patches, axis=1)

    monkeypatch.setattr(train_step, "multi_patch", equal_patches)
    steps = {}
    for pieces in (1, 2):  # another area than elsewhere, since steps are cached
        config = dataclasses.replace(CONFIG, patches=dataclasses.replace(CONFIG.patches, patch_area=0.2501))
        steps[pieces] = run_steps(batches[:1], 1, accumulating(pieces, config))
    (plain, plain_metrics), (pieces, metrics) = steps[1], steps[2]
    assert_close(plain_metrics[0], metrics[0], 1e-5)
    assert largest_difference(plain.encoder.params, pieces.encoder.params) < 1e-4
    ours, theirs = (state.encoder.batch_stats["hidden_norm"] for state in (plain, pieces))
    assert largest_difference(ours["mean"], theirs["mean"]) < 1e-5
    # The unbiased variances are (64 / 63) and (32 / 31) times the biased ones: 64 patches, or 32 in each piece.
    assert largest_difference((ours["var"] - 0.9) * 63 / 64, (theirs["var"] - 0.9) * 31 / 32) < 1e-5


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_learning_rate_falls_to_0_over_all_steps(schedule):
    """Along a half cosine or a line."""
    hyperparameters = Hyperparameters.of(TrainingConfig(max_epochs=2, learning_rate=0.3, schedule=schedule), 6)
    left = [(1 + math.cos(math.pi * t / 12)) / 2 if schedule == "cosine" else 1 - t / 12 for t in range(12)]
    expected = [0.3 * fraction for fraction in left]
    np.testing.assert_allclose([float(learning_rate(t, hyperparameters)) for t in range(12)], expected, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_warm_up_rises_linearly_then_falls(schedule):
    config = TrainingConfig(max_epochs=2, warmup_epochs=0.5, learning_rate=0.3, schedule=schedule)
    rates = [float(learning_rate(t, Hyperparameters.of(config, 8))) for t in range(17)]
    np.testing.assert_allclose(rates[:5], [0.06, 0.12, 0.18, 0.24, 0.3], rtol=1e-5)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[10] == pytest.approx(0.15, rel=1e-5)  # half of the way
    assert rates[16] == pytest.approx(0.0, abs=1e-7)


def test_a_learning_rate_of_zero_leaves_the_parameters(batches):
    """After the last step of the schedule, the rate is 0, but BatchNorm's statistics still change."""
    step, hyperparameters, mesh = compiled_step(1, CONFIG)
    start = jax.device_get(create_state(CONFIG.model, hyperparameters, mesh))
    kept = jax.tree.map(lambda x: x + STEPS_PER_EPOCH if x.dtype == jnp.int32 else x, start)
    before = jax.device_put(kept, replicated(mesh))
    after, metrics = step(hyperparameters, before, jax.device_put(batches[0], split_images(mesh)))
    assert float(metrics["learning_rate"]) == 0
    for ours, theirs in zip(jax.tree.leaves(kept.encoder.params), jax.tree.leaves(after.encoder.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(
        kept.encoder.batch_stats["hidden_norm"]["mean"], after.encoder.batch_stats["hidden_norm"]["mean"]
    )
