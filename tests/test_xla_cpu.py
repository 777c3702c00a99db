"""The forms for XLA's CPU compiler, compared with the plain formulas in their docstrings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empssl_jax.method import xla_cpu

RANDOM = np.random.default_rng(0)


def in_float32(*arrays):
    return [jnp.asarray(array, jnp.float32) for array in arrays]


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [((7,), (0,)), ((40, 7), (0,)), ((6, 5, 4, 3), (0, 1, 2)), ((6, 5, 4, 3), (3, 1)), ((6, 5), (0, 1)), ((6, 5), ())],
)
def test_sums_of_pairs(shape, axes, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    a, b = RANDOM.normal(1.0, 2.0, shape), RANDOM.normal(-3.0, 1.0, shape)
    sums = xla_cpu.sum_pair(*in_float32(a, b), axes)
    for ours, expected in zip(sums, (a.sum(axes), b.sum(axes)), strict=True):
        assert ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 4), (300, 2), (3, 3, 4, 6)])
def test_norms_of_trees(shape):
    a, b = ({"one": RANDOM.normal(size=shape), "two": [RANDOM.normal(size=(2, 2))]} for _ in range(2))
    expected = [np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(tree))) for tree in (a, b)]
    ours = xla_cpu.norm_pair(*jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (a, b)))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("images", "features_in", "features_out"), [(7, 6, 5), (1, 1, 4), (3, 16, 1)])
def test_convolutions_to_2x2(stride, images, features_in, features_out):
    """The output and both gradients agree with the general convolution."""
    side = 2 * stride
    x, kernel, g = in_float32(
        RANDOM.normal(size=(images, side, side, features_in)),
        RANDOM.normal(size=(3, 3, features_in, features_out)),
        RANDOM.normal(size=(images, 2, 2, features_out)),
    )

    def general(x, kernel):
        layout, highest = ("NHWC", "HWIO", "NHWC"), jax.lax.Precision.HIGHEST
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), [(1, 1), (1, 1)], dimension_numbers=layout, precision=highest
        )

    y, pull_back = jax.vjp(lambda x, kernel: xla_cpu.convolution_to_2x2(x, kernel, stride), x, kernel)
    expected, general_pull_back = jax.vjp(general, x, kernel)
    for ours, theirs in zip((y, *pull_back(g)), (expected, *general_pull_back(g)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("height", "width"), [(1, 5), (16, 16), (32, 32), (32, 40), (33, 20), (33, 40), (64, 64)]
)  # up to a height of 32 a sum of products, above it a matrix product
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_matrices_applied_to_both_axes(backend, height, width, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    planes, rows, columns = (RANDOM.random(shape) for shape in ((3, height, width), (9, height), (7, width)))
    ours = xla_cpu.apply_to_axes(*in_float32(planes, rows, columns))
    np.testing.assert_allclose(ours, np.einsum("chw,ih,jw->cij", planes, rows, columns), rtol=1e-5)


@pytest.mark.parametrize(("backend", "loops"), [("cpu", 0), ("gpu", 1)])
def test_maps_one_after_the_other(backend, loops, monkeypatch):
    """The values and the gradient agree with `jax.lax.map`, and only accelerators have a loop."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    (xs,) = in_float32(RANDOM.normal(size=(3, 4)))

    def f(x):
        return {"sines": jnp.sin(x), "sum": jnp.sum(x**3)}

    ours, pull_back = jax.vjp(lambda xs: xla_cpu.sequential_map(f, xs), xs)
    expected, plain_pull_back = jax.vjp(lambda xs: jax.lax.map(f, xs), xs)
    results = (ours, pull_back(ours)), (expected, plain_pull_back(ours))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert jax.jit(lambda xs: xla_cpu.sequential_map(f, xs)).lower(xs).as_text().count("stablehlo.while") == loops
