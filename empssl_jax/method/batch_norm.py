"""Batch normalisation (Ioffe, Szegedy 2015), its statistics and its gradient in as few passes as possible.

Automatic differentiation of the textbook formula makes four sums over all positions and patches in the backward pass;
two are enough, and both passes make their two sums together. Statistics and arithmetic are float32 in any precision.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from empssl_jax.method.xla_cpu import sum_pair

MOMENTUM = 0.9  # share of itself that a running statistic keeps in a step
EPSILON = 1e-5


class BatchNorm(nnx.Module):
    """Batch normalisation as torch defines it, its statistics shared by all devices along `axis_name`.

    In training mode the batch's statistics normalise, and the running ones move towards them; the running variance is
    the unbiased one, as torch's and unlike Flax's.
    """

    def __init__(self, features: int, axis_name: str | None):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.var = nnx.BatchStat(jnp.ones(features))
        self.axis_name = axis_name
        self.use_running_average = False  # set by Module.train() and Module.eval()

    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        scale, bias = self.scale[...], self.bias[...]
        if self.use_running_average:
            return _affine(x, *_slope_and_offset(self.mean[...], self.var[...], scale, bias))
        y, mean, var = normalise_batch(x, scale, bias, self.axis_name)
        n = _count(x, self.axis_name)
        self.mean[...] = MOMENTUM * self.mean[...] + (1 - MOMENTUM) * mean
        self.var[...] = MOMENTUM * self.var[...] + (1 - MOMENTUM) * var * (n / max(n - 1.0, 1.0))
        return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalise_batch(
    x: Float[Array, "*batch C"], scale: Float[Array, " C"], bias: Float[Array, " C"], axis_name: str | None
) -> tuple[Float[Array, "*batch C"], Float[Array, " C"], Float[Array, " C"]]:
    """Normalises by the batch's statistics; returns the result, the mean, and the biased variance.

    Only the first result has a gradient.
    """
    return _forward(x, scale, bias, axis_name)[0]


def _forward(x, scale, bias, axis_name):
    n = _count(x, axis_name)
    wide = x.astype(jnp.float32)
    sum_x, sum_squares = _channel_sums(wide, wide * wide, axis_name)
    mean = sum_x / n
    var = jnp.maximum(sum_squares / n - mean * mean, 0.0)
    return (_affine(x, *_slope_and_offset(mean, var, scale, bias)), mean, var), (x, mean, var, scale)


def _backward(axis_name, residuals, cotangents):
    x, mean, var, scale = residuals
    g = cotangents[0].astype(jnp.float32)
    wide = x.astype(jnp.float32)
    n = _count(x, axis_name)
    rate = jax.lax.rsqrt(var + EPSILON)
    sum_g, sum_gx = _channel_sums(g, g * wide, axis_name)
    d_scale = (sum_gx - mean * sum_g) * rate
    # scale * rate * (g - mean of g - normalised x * mean of (g * normalised x)), as g * a + x * b + c.
    a = scale * rate
    b = -a * rate * d_scale / n
    c = -a * sum_g / n - mean * b
    return (g * _row(a, x) + wide * _row(b, x) + _row(c, x)).astype(x.dtype), d_scale, sum_g


normalise_batch.defvjp(_forward, _backward)


def _slope_and_offset(mean, var, scale, bias):
    slope = scale * jax.lax.rsqrt(var + EPSILON)
    return slope, bias - mean * slope


def _affine(x, slope, offset):
    return (x.astype(jnp.float32) * _row(slope, x) + _row(offset, x)).astype(x.dtype)


def _row(channels, x):
    return channels.reshape((1,) * (x.ndim - 1) + (-1,))


def _count(x, axis_name: str | None) -> float:
    """How many numbers a channel has on all devices; as a float, since it can be too large for 32 bits."""
    devices = jax.lax.axis_size(axis_name) if axis_name else 1
    return float(devices * x.size // x.shape[-1])


def _channel_sums(a, b, axis_name: str | None):
    """Sums of two arrays over all but the channels, on all devices along `axis_name`."""
    sums = sum_pair(a, b, tuple(range(a.ndim - 1)))
    return jax.lax.psum(sums, axis_name) if axis_name else sums
