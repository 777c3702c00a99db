"""What is measured: empssl_jax against a plain PyTorch version of the same work, and against the machine's limits."""

import empssl_jax  # noqa: F401  (before JAX: it sets what XLA reads when it starts)
