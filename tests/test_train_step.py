"""The train step on one and on eight devices, the learning rate schedule, and whether the loss falls."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empssl_jax.config import Config, DataConfig, ModelConfig, PatchConfig, RunConfig, TrainingConfig
from empssl_jax.data.batches import Batch
from empssl_jax.method.hyperparameters import Hyperparameters, learning_rate
from empssl_jax.method.train_step import create_state, make_train_step
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
    difference = jax.tree.map(lambda a, b: np.max(np.abs(a - b)) / max(np.max(np.abs(a)), 1e-3), ours, theirs)
    assert max(jax.tree.leaves(difference)) < 1e-4
    for ours, theirs in zip(on_one_device[1], run_steps(batches, 8)[1], strict=True):
        assert_close(ours, theirs)


def assert_close(ours, theirs):
    for name in ours:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


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
    difference = jax.tree.map(lambda a, b: np.max(np.abs(a - b)) / max(np.max(np.abs(a)), 1e-3), ours[0], theirs[0])
    assert max(jax.tree.leaves(difference)) < 1e-4


def test_gradients_are_summed_over_devices_in_float32(batches):
    """With bfloat16 layers, no sum over devices is in bfloat16."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, precision="bfloat16"))
    step, hyperparameters, mesh = compiled_step(8, config)
    state = create_state.eval_shape(config.model, hyperparameters, mesh)
    lowered = step.lower(hyperparameters, state, jax.device_put(batches[0], split_images(mesh))).as_text()
    sums = re.findall(r"all_reduce.*?\) : \((.*?)\) ->", lowered, re.DOTALL)
    assert len(sums) > 20
    assert not [types for types in sums if "bf16" in types]


def test_the_schedule_is_a_half_cosine_over_all_steps():
    hyperparameters = Hyperparameters.of(TrainingConfig(max_epochs=2, learning_rate=0.3), 6)
    expected = [0.15 * (1 + math.cos(math.pi * t / 12)) for t in range(12)]
    np.testing.assert_allclose([float(learning_rate(t, hyperparameters)) for t in range(12)], expected, rtol=1e-5)


def test_warm_up_rises_linearly_then_falls():
    config = TrainingConfig(max_epochs=2, warmup_epochs=0.5, learning_rate=0.3)
    rates = [float(learning_rate(t, Hyperparameters.of(config, 8))) for t in range(17)]
    np.testing.assert_allclose(rates[:5], [0.06, 0.12, 0.18, 0.24, 0.3], rtol=1e-5)
    assert rates[4:] == sorted(rates[4:], reverse=True)
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
