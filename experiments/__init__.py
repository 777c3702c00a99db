"""Experiments with the method: which choices improve the embeddings, and how accuracy grows with time."""

import empssl_jax  # noqa: F401  (before JAX, because it sets flags that XLA reads when it starts)
