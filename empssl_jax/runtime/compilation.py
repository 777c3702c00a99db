"""Compiled programs are kept on disk, so that the same command starts faster the next time."""

import os
from pathlib import Path

import jax


def keep_compiled_programs() -> None:
    """Turns JAX's persistent compilation cache on, in empssl_jax/ of the user's cache folder.

    A folder that the user has chosen (`JAX_COMPILATION_CACHE_DIR`) stands. JAX warns and goes on where the folder
    cannot be written to. Programs are found again only for the same versions, options and kind of device.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(user_cache()))
        # JAX leaves out what compiles in less than a second: together that is a third of the time to the first step.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def user_cache() -> Path:
    """The package's folder in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "empssl_jax"
