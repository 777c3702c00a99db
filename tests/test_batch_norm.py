"""Compares batch normalisation and its gradients with float64 formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from empssl_jax.method import batch_norm
from empssl_jax.runtime.devices import DATA_AXIS, device_mesh

SHAPES = [(6, 5, 4, 3), (40, 7)]


def oracle(x, scale, bias, g):
    """Output, mean, biased variance, and the gradients of sum(g * output), by the textbook formulas in float64."""
    x, scale, bias, g = (np.asarray(a, np.float64) for a in (x, scale, bias, g))
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes), x.var(axes)
    rate = 1 / np.sqrt(var + 1e-5)
    normal = (x - mean) * rate
    d_normal = g * scale
    d_x = rate * (d_normal - d_normal.mean(axes) - normal * (d_normal * normal).mean(axes))
    return normal * scale + bias, mean, var, d_x, (g * normal).sum(axes), g.sum(axes)


def example(shape):
    random = np.random.default_rng(0)
    x, g = (jnp.asarray(random.normal(1.5, 2.0, shape), jnp.float32) for _ in range(2))
    scale, bias = (jnp.asarray(random.normal(1.0, 0.5, shape[-1]), jnp.float32) for _ in range(2))
    return x, scale, bias, g


@pytest.mark.parametrize("shape", SHAPES)
def test_output_statistics_and_gradients(shape):
    x, scale, bias, g = example(shape)
    (y, mean, var), pull_back = jax.vjp(lambda *args: batch_norm.normalise_batch(*args, None), x, scale, bias)
    gradients = pull_back((g, jnp.zeros_like(mean), jnp.zeros_like(var)))
    for ours, theirs in zip((y, mean, var, *gradients), oracle(x, scale, bias, g), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("shape", [(16, 5, 4, 3), (40, 7)])
def test_devices_share_statistics_and_gradients(shape):
    """Eight devices with a shard each equal one device with the full batch."""
    x, scale, bias, g = example(shape)

    def gradients(x, scale, bias, g):
        def loss(x, scale, bias):
            y, mean, var = batch_norm.normalise_batch(x, scale, bias, DATA_AXIS)
            return jax.lax.psum(jnp.sum(y * g), DATA_AXIS), (mean, var)

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, scale, bias)

    rows, same = PartitionSpec(DATA_AXIS), PartitionSpec()
    specs = {"in_specs": (rows, same, same, rows), "out_specs": ((rows, same, same), (same, same))}
    (d_x, d_scale, d_bias), (mean, var) = jax.jit(jax.shard_map(gradients, mesh=device_mesh(8), **specs))(
        x, scale, bias, g
    )
    expected = oracle(x, scale, bias, g)[1:]
    for ours, theirs in zip((mean, var, d_x, d_scale, d_bias), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def test_running_statistics_and_evaluation():
    x, *_ = example((6, 5, 4, 3))
    norm = batch_norm.BatchNorm(3, None)
    norm(x)
    mean, var = 0.1 * jnp.mean(x, (0, 1, 2)), 0.9 + 0.1 * jnp.var(x, (0, 1, 2), ddof=1)
    np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], var, rtol=1e-5)
    norm.eval()
    np.testing.assert_allclose(norm(x), (x - mean) / np.sqrt(var + 1e-5), rtol=1e-4, atol=1e-5)
    assert nnx.state(norm, nnx.BatchStat)


def test_bfloat16_is_rounded_once():
    """The result is the rounded float32 result. Intermediate values are not rounded."""
    x, scale, bias, _ = example((6, 5, 4, 3))
    x = x.astype(jnp.bfloat16)
    y, mean, _ = batch_norm.normalise_batch(x, scale, bias, None)
    assert (y.dtype, mean.dtype) == (jnp.bfloat16, jnp.float32)
    exact, *_ = oracle(x, scale, bias, np.zeros(x.shape))
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8, atol=1e-5)
