"""Stress tests: random and damaged input, kills at random moments, and memory in long runs."""

import empssl_jax  # noqa: F401  (before JAX, because it sets flags that XLA reads when it starts)
