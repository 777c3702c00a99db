"""LARS (You et al. 2017, arXiv 1708.03888) with a clipped trust ratio, as a chain of optax transformations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from empssl_jax.config import TrainingConfig
from empssl_jax.method.xla_cpu import norm_pair


class ClippedTrustRatioState(NamedTuple):
    """Number of updates made so far: the schedule's position."""

    step: jax.Array


def lars(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    momentum: float = TrainingConfig.momentum,
    trust_coefficient: float = TrainingConfig.trust_coefficient,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """LARS as EMP-SSL's references use it.

    Kernels (arrays of more than one dimension) get weight decay and an adapted rate; scales and biases (one
    dimension) get their plain gradient. Then momentum, then the learning rate.

    `optax.lars` differs: it does not clip the adapted rate at the learning rate, it divides by |g + wd w| where this
    divides by |g| + wd |w| + eps, it still adapts after a zero gradient, and it applies momentum after the learning
    rate.

    Args:
        learning_rate: a number or an optax schedule.
        weight_decay: L2 penalty on kernels, at least 0.
        momentum: decay of the accumulated updates, in [0, 1).
        trust_coefficient: eta of the LARS paper.
        eps: keeps the ratio finite.
    """
    adapt = _clipped_trust_ratio(learning_rate, weight_decay, trust_coefficient, eps)
    return optax.chain(
        optax.masked(adapt, lambda params: jax.tree.map(lambda w: w.ndim > 1, params)),
        optax.trace(decay=momentum, nesterov=True),
        optax.scale_by_learning_rate(learning_rate),
    )


def _clipped_trust_ratio(learning_rate, weight_decay, trust_coefficient, eps) -> optax.GradientTransformation:
    """Turns g into (g + wd w) * trust |w| / (|g| + wd |w| + eps), the ratio clipped so that lr * ratio <= lr."""

    def init(params):
        del params
        return ClippedTrustRatioState(step=jnp.zeros([], jnp.int32))

    def update(updates, state, params):
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate

        def adapt(g, w):
            w_norm, g_norm = norm_pair(w, g)
            ratio = trust_coefficient * w_norm / (g_norm + weight_decay * w_norm + eps)
            ratio = jnp.minimum(ratio / rate, 1.0)  # clipped: never a larger rate than SGD's
            return jnp.where((w_norm > 0) & (g_norm > 0), (g + weight_decay * w) * ratio, g)

        return jax.tree.map(adapt, updates, params), ClippedTrustRatioState(step=state.step + 1)

    return optax.GradientTransformation(init, update)
