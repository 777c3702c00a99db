"""Tries to break runs: random input, damaged files, kills at random moments, hours under load."""

import empssl_jax  # noqa: F401  (before JAX: it sets what XLA reads when it starts)
