"""LARS, compared with the reference's numbers, and its special cases."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from empssl_jax.method.lars import lars

ARRAYS = ("conv", "dense", "scale", "bias", "tiny")


def test_golden_steps(golden):
    numbers = golden("lars")
    rates = [float(numbers[f"lr_{t}"]) for t in range(12)]
    optimizer = lars(lambda count: jnp.array(rates)[count], 1e-4)
    params = {name: jnp.asarray(numbers[f"init_{name}"]) for name in ARRAYS}
    state = optimizer.init(params)
    for t in range(12):
        gradients = {name: jnp.asarray(numbers[f"grad_{t}_{name}"]) for name in ARRAYS}
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for name in ARRAYS:
            expected = numbers[f"param_{t}_{name}"]
            assert np.max(np.abs(params[name] - expected)) < 1e-5 * np.max(np.abs(expected)), (t, name)


def one_step(gradient, weight, **options):
    options = {"learning_rate": 0.1, "weight_decay": 0.01, "momentum": 0.0, **options}
    optimizer = lars(**options)
    updates, _ = optimizer.update({"w": gradient}, optimizer.init({"w": weight}), {"w": weight})
    return updates["w"]


@pytest.mark.parametrize(("gradient", "weight"), [(0.0, 1.0), (1.0, 0.0)])
def test_a_zero_norm_passes_the_gradient_unchanged(gradient, weight):
    update = one_step(jnp.full((2, 3), gradient), jnp.full((2, 3), weight))
    np.testing.assert_allclose(update, -0.1 * gradient * np.ones((2, 3)), rtol=1e-6)


def test_vectors_get_neither_decay_nor_adaptation():
    np.testing.assert_allclose(one_step(jnp.full(4, 2.0), jnp.full(4, 3.0)), -0.2 * np.ones(4), rtol=1e-6)


def test_the_ratio_of_a_kernel():
    gradient, weight = np.full((2, 2), 0.5), np.full((2, 2), 3.0)
    ratio = 0.005 * 6.0 / (1.0 + 0.01 * 6.0)
    assert ratio < 0.1
    expected = -(gradient + 0.01 * weight) * ratio  # the learning rate cancels
    np.testing.assert_allclose(one_step(jnp.array(gradient), jnp.array(weight)), expected, rtol=1e-5)


def test_clipping_steps_no_further_than_sgd():
    gradient, weight = jnp.full((2, 2), 1e-4), jnp.full((2, 2), 3.0)
    np.testing.assert_allclose(one_step(gradient, weight), -0.1 * (1e-4 + 0.03) * np.ones((2, 2)), rtol=1e-5)
