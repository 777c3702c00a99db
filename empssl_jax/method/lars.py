"""LARS (You et al. 2017, arXiv 1708.03888) with a clipped trust ratio, as a chain of optax transformations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from empssl_jax.config import TrainingConfig
from empssl_jax.method.xla_cpu import norm_pair

EPSILON = 1e-8  # keeps the trust ratio finite
Scalar = float | Float[Array | np.ndarray, ""]


class ClippedTrustRatioState(NamedTuple):
    """The position in the learning rate schedule."""

    step: jax.Array  # number of updates made so far


def lars(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Scalar,
    momentum: Scalar = TrainingConfig.momentum,
    trust_coefficient: Scalar = TrainingConfig.trust_coefficient,
) -> optax.GradientTransformation:
    """LARS as in EMP-SSL's reference implementations.

    Kernels (arrays of more than one dimension) get weight decay and an adapted rate. Scales and biases (one dimension)
    keep their plain gradient. Nesterov momentum follows, and then the learning rate.

    `optax.lars` differs in four ways. It does not clip the adapted rate at the learning rate. It divides by |g + wd w|
    instead of |g| + wd |w| + eps. It adapts the rate after a zero gradient, too. It applies momentum after the learning
    rate.

    Args:
        learning_rate: a number or an optax schedule.
        weight_decay: L2 penalty on kernels, at least 0.
        momentum: decay of the accumulated updates, in [0, 1).
        trust_coefficient: eta in the LARS paper.
    """
    adapt = _clipped_trust_ratio(learning_rate, weight_decay, trust_coefficient)
    return optax.chain(
        optax.masked(adapt, lambda params: jax.tree.map(lambda w: w.ndim > 1, params)),
        optax.trace(decay=momentum, nesterov=True),
        optax.scale_by_learning_rate(learning_rate),
    )


def _clipped_trust_ratio(
    learning_rate: optax.ScalarOrSchedule, weight_decay: Scalar, trust_coefficient: Scalar
) -> optax.GradientTransformation:
    """Turns g into (g + wd w) * min(ratio / lr, 1), where ratio = trust_coefficient |w| / (|g| + wd |w| + 1e-8).

    The learning rate lr multiplies the result later, so the adapted rate min(ratio, lr) never exceeds that of SGD.
    Where w or g is zero, g stays as it is.
    """

    def init(params: optax.Params) -> ClippedTrustRatioState:
        del params
        return ClippedTrustRatioState(step=jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: ClippedTrustRatioState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ClippedTrustRatioState]:
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate

        @jax.jit  # traced once for all kernels of a shape
        def adapt(g: jax.Array, w: jax.Array) -> jax.Array:
            w_norm, g_norm = norm_pair(w, g)
            ratio = trust_coefficient * w_norm / (g_norm + weight_decay * w_norm + EPSILON)
            clipped = jnp.minimum(ratio / rate, 1.0)
            return jnp.where((w_norm > 0) & (g_norm > 0), (g + weight_decay * w) * clipped, g)

        return jax.tree.map(adapt, updates, params), ClippedTrustRatioState(step=state.step + 1)

    return optax.GradientTransformation(init, update)
