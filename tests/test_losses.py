"""The objective, compared with golden numbers and a float64 oracle, and its properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empssl_jax.method.losses import coding_rate, coding_rate_bounds, emp_ssl_loss, normalise, similarity

EPS = 0.2


def unit_rows(*shape, seed=0):
    z = np.random.default_rng(seed).standard_normal(shape)
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def oracle_coding_rate(z, eps=EPS):
    """Equation 1 as written, with the D x D determinant, in float64."""
    z = np.asarray(z, np.float64)
    _, num_images, dim = z.shape
    scale = dim / (num_images * eps)
    return 0.5 * np.mean([np.linalg.slogdet(np.eye(dim) + scale * patch.T @ patch)[1] for patch in z])


@pytest.mark.parametrize("case", range(5))
def test_golden_values_and_gradients(golden, case):
    numbers = golden("losses")
    projections = jnp.asarray(numbers[f"{case}_projections"], jnp.float32)

    def total(z):
        loss = emp_ssl_loss(normalise(z), 200.0, EPS)
        return loss.total, loss

    gradient, loss = jax.jit(jax.grad(total, has_aux=True))(projections)
    assert float(loss.coding_rate) == pytest.approx(-float(numbers[f"{case}_coding_rate_loss"]), rel=1e-5)
    assert float(loss.similarity) == pytest.approx(-float(numbers[f"{case}_invariance_loss"]), rel=1e-5)
    assert float(loss.total) == pytest.approx(float(numbers[f"{case}_total"]), rel=1e-5)
    expected = numbers[f"{case}_grad"]
    assert np.max(np.abs(gradient - expected)) < 1e-4 * np.max(np.abs(expected))


@pytest.mark.parametrize(("images", "dim"), [(8, 32), (32, 8), (16, 16), (100, 256)])
def test_both_sides_of_the_determinant_equal_the_oracle(images, dim):
    z = unit_rows(3, images, dim)
    assert float(coding_rate(jnp.float32(z), EPS)) == pytest.approx(oracle_coding_rate(z), rel=1e-5)


@pytest.mark.parametrize(("images", "dim"), [(50, 128), (128, 50)])
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3])
def test_nearly_equal_rows_are_finite_and_exact(images, dim, spread):
    z = unit_rows(2, 1, dim) + spread * unit_rows(2, images, dim, seed=1)
    z = z / np.linalg.norm(z, axis=-1, keepdims=True)
    value, gradient = jax.value_and_grad(lambda z: coding_rate(z, EPS))(jnp.float32(z))
    assert float(value) == pytest.approx(oracle_coding_rate(z), rel=1e-4)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(("images", "dim"), [(6, 10), (10, 6)])
def test_gradient_equals_the_closed_form(images, dim):
    """d/dZ 1/2 logdet(I + a Z^T Z) = a Z (I + a Z^T Z)^-1, in float64."""
    z = unit_rows(4, images, dim)
    scale = dim / (images * EPS)
    expected = [scale * patch @ np.linalg.inv(np.eye(dim) + scale * patch.T @ patch) / len(z) for patch in z]
    gradient = jax.grad(lambda z: coding_rate(z, EPS))(jnp.float32(z))
    np.testing.assert_allclose(gradient, np.array(expected), rtol=1e-4, atol=1e-6)


def test_coding_rate_is_blind_to_order_and_rotation():
    z = unit_rows(3, 12, 24)
    rotation, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((24, 24)))
    rate = float(coding_rate(jnp.float32(z), EPS))
    assert float(coding_rate(jnp.float32(z[:, ::-1]), EPS)) == pytest.approx(rate, rel=1e-5)
    assert float(coding_rate(jnp.float32(z @ rotation), EPS)) == pytest.approx(rate, rel=1e-5)


def test_collapsed_projections_score_worse_than_spread_ones():
    spread = jnp.float32(np.repeat(unit_rows(1, 16, 32), 4, axis=0))
    collapsed = jnp.float32(np.broadcast_to(unit_rows(1, 1, 32), (4, 16, 32)))
    better, worse = emp_ssl_loss(spread, 200.0, EPS), emp_ssl_loss(collapsed, 200.0, EPS)
    assert float(better.similarity) == pytest.approx(1.0)
    assert float(worse.similarity) == pytest.approx(1.0)
    assert float(better.coding_rate) > float(worse.coding_rate) > 0
    assert float(better.total) < float(worse.total)


@pytest.mark.parametrize(("images", "dim"), [(8, 32), (64, 16)])
def test_bounds_are_reached(images, dim):
    smallest, largest = coding_rate_bounds(images, dim, EPS)
    equal = jnp.float32(np.broadcast_to(unit_rows(1, 1, dim), (2, images, dim)))
    spread = jnp.float32(np.broadcast_to(np.tile(np.eye(dim), (-(-images // dim), 1))[:images], (2, images, dim)))
    assert float(coding_rate(equal, EPS)) == pytest.approx(smallest, rel=1e-5)
    assert float(coding_rate(spread, EPS)) == pytest.approx(largest, rel=1e-5)
    assert smallest < float(coding_rate(jnp.float32(unit_rows(2, images, dim)), EPS)) < largest


def test_similarity_is_the_length_of_the_mean_projection():
    z = np.random.default_rng(3).standard_normal((5, 7, 9))
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    expected = np.linalg.norm(z.mean(axis=0), axis=-1).mean()
    assert float(similarity(jnp.float32(z))) == pytest.approx(expected, rel=1e-6)


def test_similarity_of_opposite_patches_is_small():
    z = unit_rows(1, 5, 8)
    assert float(similarity(jnp.float32(np.concatenate([z, z])))) == pytest.approx(1.0)
    assert float(similarity(jnp.float32(np.concatenate([z, -z])))) == pytest.approx(0.0, abs=1e-6)


def test_normalise_hides_no_overflow():
    vectors = jnp.float32([[3.0, 4.0], [0.0, 0.0], [1e20, 1e20]])
    np.testing.assert_allclose(normalise(vectors), [[0.6, 0.8], [0.0, 0.0], [np.nan, np.nan]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda v: jnp.sum(normalise(v)))(vectors[:2])).all()


@pytest.mark.parametrize(("images", "dim"), [(8, 64), (64, 8), (100, 1024)])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0])
def test_rows_rounded_to_bfloat16_are_finite_and_exact(images, dim, spread):
    """Rounded rows no longer have unit length."""
    z = unit_rows(2, 1, dim) + spread * unit_rows(2, images, dim, seed=1)
    z = jnp.asarray(z / np.linalg.norm(z, axis=-1, keepdims=True), jnp.bfloat16).astype(jnp.float32)
    value, gradient = jax.value_and_grad(lambda z: coding_rate(z, EPS))(z)
    assert float(value) == pytest.approx(oracle_coding_rate(z), rel=1e-4)
    assert np.isfinite(gradient).all()
