"""What is measured: empssl_jax against a plain PyTorch version of the same work, and against the machine's limits."""
