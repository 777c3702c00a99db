"""Keeps compiled programs on disk, so the same command starts faster the next time."""

import functools
import os
import sys
from pathlib import Path

import jax


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, in empssl_jax/ of the user's cache folder, if there is one.

    A folder that the user has set (`JAX_COMPILATION_CACHE_DIR`) is kept. If that folder is not writable, JAX warns and
    continues without it. JAX reuses a program only for the same versions, options and kind of device.
    """
    folder_is_set = jax.config.jax_compilation_cache_dir is not None  # type: ignore[attr-defined]
    if not folder_is_set and (folder := user_cache()) is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default JAX leaves out programs that compile in less than a second. Together they take a third of the time to
    # the first step.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@functools.cache
def user_cache() -> Path | None:
    """The package's folder in the user's cache folder. None if it cannot be written to, which is printed once."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "empssl_jax"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
        reason = f"{folder} is not writable"
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
    except RuntimeError:  # the user has no home folder, as in a container that runs under a bare user id
        reason = "this user has no home folder"
    print(
        f"warning: there is no cache folder ({reason}): the next command compiles and decodes again, unless "
        "$XDG_CACHE_HOME names a writable folder",
        file=sys.stderr,
    )
    return None
