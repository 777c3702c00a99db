"""Keeps compiled programs on disk, so the same command starts faster the next time."""

import os
from pathlib import Path

import jax


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, in empssl_jax/ of the user's cache folder.

    A folder that the user has set (`JAX_COMPILATION_CACHE_DIR`) is kept. If the folder is not writable, JAX warns and
    continues without it. JAX reuses a program only for the same versions, options and kind of device.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(user_cache()))
        # By default JAX leaves out programs that compile in less than a second. Together they take a third of the time
        # to the first step.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def user_cache() -> Path:
    """The package's folder in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "empssl_jax"
