"""Questions about the method, answered by runs: what makes better embeddings, and what a minute buys."""

import empssl_jax  # noqa: F401  (before JAX: it sets what XLA reads when it starts)
