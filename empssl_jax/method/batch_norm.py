"""Batch normalisation (Ioffe and Szegedy 2015), with a gradient that reads its arrays as few times as possible.

Two sums over all positions and patches are enough for the backward pass; automatic differentiation of the textbook
formula computes four. The forward pass also needs two, and each pass computes its two sums together. Statistics and
arithmetic are float32 in any precision.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from empssl_jax.method.xla_cpu import sum_pair

MOMENTUM = 0.9  # share of its value that a running statistic keeps in each step
EPSILON = 1e-5


class BatchNorm(nnx.Module):
    """Batch normalisation as in torch, with statistics of the whole batch on all devices along `axis_name`.

    In training mode, it normalises by the batch's statistics and moves the running statistics towards them. The running
    variance is the unbiased one, as in torch and unlike in Flax.
    """

    def __init__(self, features: int, axis_name: str | None):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.var = nnx.BatchStat(jnp.ones(features))
        self.axis_name = axis_name
        self.use_running_average = False  # set by Module.train() and Module.eval()

    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        if self.use_running_average:
            return _affine(x, *self.running_slope_and_offset())
        y, mean, var = normalise_batch(x, self.scale[...], self.bias[...], self.axis_name)
        n = _count(x, self.axis_name)
        self.mean[...] = MOMENTUM * self.mean[...] + (1 - MOMENTUM) * mean
        self.var[...] = MOMENTUM * self.var[...] + (1 - MOMENTUM) * var * (n / max(n - 1.0, 1.0))
        return y

    def running_slope_and_offset(self) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
        """What each channel is multiplied by, and what is then added, with the running statistics."""
        return _slope_and_offset(self.mean[...], self.var[...], self.scale[...], self.bias[...])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalise_batch(
    x: Float[Array, "*batch C"], scale: Float[Array, " C"], bias: Float[Array, " C"], axis_name: str | None
) -> tuple[Float[Array, "*batch C"], Float[Array, " C"], Float[Array, " C"]]:
    """Normalises by the batch's statistics; returns the output, the mean and the biased variance.

    Gradients flow through the output only, not through the mean and the variance.
    """
    return _forward(x, scale, bias, axis_name)[0]


@functools.partial(jax.jit, static_argnums=3)  # traced once for all layers of a shape
def _forward(
    x: Float[Array, "*batch C"], scale: Float[Array, " C"], bias: Float[Array, " C"], axis_name: str | None
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array, Array]]:
    """The results of `normalise_batch`, and what its backward pass needs."""
    n = _count(x, axis_name)
    wide = x.astype(jnp.float32)
    sum_x, sum_squares = _channel_sums(wide, wide * wide, axis_name)
    mean = sum_x / n
    var = jnp.maximum(sum_squares / n - mean * mean, 0.0)
    return (_affine(x, *_slope_and_offset(mean, var, scale, bias)), mean, var), (x, mean, var, scale)


@functools.partial(jax.jit, static_argnums=0)  # likewise
def _backward(
    axis_name: str | None, residuals: tuple[Array, Array, Array, Array], cotangents: tuple[Array, Array, Array]
) -> tuple[Float[Array, "*batch C"], Float[Array, " C"], Float[Array, " C"]]:
    """The gradients for x, scale and bias. Those for scale and bias are sums over all devices."""
    x, mean, var, scale = residuals
    g = cotangents[0].astype(jnp.float32)
    wide = x.astype(jnp.float32)
    n = _count(x, axis_name)
    inverse_deviation = jax.lax.rsqrt(var + EPSILON)
    sum_g, sum_gx = _channel_sums(g, g * wide, axis_name)
    d_scale = (sum_gx - mean * sum_g) * inverse_deviation
    # d_x = scale * inverse_deviation * (g - mean of g - normalised x * mean of (g * normalised x)),
    # written as g * a + x * b + c.
    a = scale * inverse_deviation
    b = -a * inverse_deviation * d_scale / n
    c = -a * sum_g / n - mean * b
    return (g * _row(a, x) + wide * _row(b, x) + _row(c, x)).astype(x.dtype), d_scale, sum_g


normalise_batch.defvjp(_forward, _backward)


def _slope_and_offset(
    mean: Float[Array, " C"], var: Float[Array, " C"], scale: Float[Array, " C"], bias: Float[Array, " C"]
) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    """Normalisation, scale and bias as one affine map of each channel."""
    slope = scale * jax.lax.rsqrt(var + EPSILON)
    return slope, bias - mean * slope


def _affine(
    x: Float[Array, "*batch C"], slope: Float[Array, " C"], offset: Float[Array, " C"]
) -> Float[Array, "*batch C"]:
    return (x.astype(jnp.float32) * _row(slope, x) + _row(offset, x)).astype(x.dtype)


def _row(channels: Float[Array, " C"], x: Float[Array, "*batch C"]) -> Float[Array, "*ones C"]:
    """Adds axes of size 1 until `channels` has as many as `x`."""
    return channels.reshape((1,) * (x.ndim - 1) + (-1,))


def _count(x: Float[Array, "*batch C"], axis_name: str | None) -> float:
    """Number of values in a channel on all devices; a float, since it can exceed 32 bits."""
    devices = jax.lax.axis_size(axis_name) if axis_name else 1
    return float(devices * x.size // x.shape[-1])


def _channel_sums(
    a: Float[Array, "*batch C"], b: Float[Array, "*batch C"], axis_name: str | None
) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    """Sums both arrays over all axes but the channels, on all devices along `axis_name`."""
    sums = sum_pair(a, b, tuple(range(a.ndim - 1)))
    return jax.lax.psum(sums, axis_name) if axis_name else sums
