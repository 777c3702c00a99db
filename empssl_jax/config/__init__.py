from empssl_jax.config.options import *  # noqa: F403
