"""The numbers of a run that are arguments of its compiled programs, so that other numbers compile nothing."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from empssl_jax.config import TrainingConfig
from empssl_jax.config.errors import require


class Hyperparameters(NamedTuple):
    """Seed, schedule, optimizer and loss, as scalars: arrays of JAX or of NumPy."""

    seed: Int[Array, ""]
    steps_per_epoch: Int[Array, ""]
    warmup_steps: Int[Array, ""]
    warmup_per_step: Float[Array, ""]  # fraction of the warm-up
    warmup_rise: Float[Array, ""]  # of the learning rate during the warm-up
    is_linear: Bool[Array, ""]  # whether the decay after the warm-up is linear, not a half cosine
    radians_per_step: Float[Array, ""]  # of this decay; all of it takes pi
    learning_rate: Float[Array, ""]  # at the peak
    weight_decay: Float[Array, ""]
    momentum: Float[Array, ""]
    trust_coefficient: Float[Array, ""]
    invariance_coefficient: Float[Array, ""]
    coding_rate_eps: Float[Array, ""]

    @classmethod
    def of(cls, config: TrainingConfig, steps_per_epoch: int) -> "Hyperparameters":
        """The numbers of a run with the given options, on the host."""
        steps = count_all_steps(steps_per_epoch, config.max_epochs)
        warmup_steps = min(round(config.warmup_epochs * steps_per_epoch), steps - 1)
        first_rate = config.learning_rate / (warmup_steps + 1)
        # Products with a reciprocal in float32 are what XLA makes of a division by a constant. With them, the rates are
        # bit-identical to those of version 0.2.0, which compiled the number of steps as a constant.
        reciprocal = np.float32(1) / np.float32(steps - warmup_steps)
        numbers: dict[str, Any] = dict(
            seed=np.int32(config.seed),
            steps_per_epoch=np.int32(steps_per_epoch),
            warmup_steps=np.int32(warmup_steps),
            warmup_per_step=np.float32(1) / np.float32(max(warmup_steps, 1)),
            warmup_rise=np.float32(config.learning_rate - first_rate),
            is_linear=np.bool_(config.schedule == "linear"),
            radians_per_step=np.float32(np.pi) * reciprocal,
            learning_rate=np.float32(config.learning_rate),
            weight_decay=np.float32(config.weight_decay),
            momentum=np.float32(config.momentum),
            trust_coefficient=np.float32(config.trust_coefficient),
            invariance_coefficient=np.float32(config.invariance_coefficient),
            coding_rate_eps=np.float32(config.coding_rate_eps),
        )
        return cls(**jax.tree.map(np.asarray, numbers))


def count_all_steps(steps_per_epoch: int, max_epochs: int) -> int:
    """The number of steps in all epochs; raises UserError if it is too large for the int32 that counts them."""
    remedy = "that makes more than 2147483647 steps, so give fewer epochs"
    require(steps_per_epoch * max_epochs < 2**31, "max_epochs", max_epochs, remedy)
    return steps_per_epoch * max_epochs


def learning_rate(step: int | Int[Array, ""], hyperparameters: Hyperparameters) -> Float[Array, ""]:
    """A half cosine or a line from the peak to 0 over all steps, after a linear warm-up if there is one.

    The warm-up begins above 0. At a rate of 0, LARS's clipping would let the whole gradient into its momentum, and the
    next steps, at a higher rate, would make the encoder collapse.
    """
    rising = hyperparameters.learning_rate - hyperparameters.warmup_rise * (1 - step * hyperparameters.warmup_per_step)
    angle = jnp.minimum((step - hyperparameters.warmup_steps) * hyperparameters.radians_per_step, jnp.pi)
    half_cosine = 0.5 * hyperparameters.learning_rate * (1 + jnp.cos(angle))
    line = hyperparameters.learning_rate * (1 - angle / jnp.pi)
    falling = jnp.where(hyperparameters.is_linear, line, half_cosine)
    return jnp.where(step < hyperparameters.warmup_steps, rising, falling)
