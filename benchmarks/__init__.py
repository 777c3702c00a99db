"""Measurements of speed and memory: empssl_jax against plain PyTorch, and against the limits of the machine."""

import empssl_jax  # noqa: F401  (before JAX, because it sets flags that XLA reads when it starts)
