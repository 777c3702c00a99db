"""The cache of compiled programs, and the trace that --profile writes."""

import os
import subprocess
import sys

import jax.numpy as jnp

from empssl_jax.runtime import compilation, profiling

PROGRAM = """
from empssl_jax.runtime.compilation import keep_compiled_programs
keep_compiled_programs()
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x * 2 + 1)(3.0)
"""


def run(**environment):
    """Runs the program; returns what it wrote to stderr."""
    # Importing JAX sets XLA's log level in this process. A user's shell does not set it.
    inherited = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, env=inherited | environment, check=True, capture_output=True, text=True).stderr


def test_programs_are_kept_in_the_users_cache_folder_and_read_without_messages(tmp_path):
    run(XDG_CACHE_HOME=str(tmp_path))
    assert list((tmp_path / "empssl_jax").iterdir())
    assert run(XDG_CACHE_HOME=str(tmp_path)) == ""


def test_a_folder_that_the_user_chose_is_used(tmp_path):
    run(XDG_CACHE_HOME=str(tmp_path / "not"), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "chosen"))
    assert list((tmp_path / "chosen").iterdir())
    assert not (tmp_path / "not").exists()


def test_an_unusable_cache_folder_is_reported_once_and_done_without():
    said = run(XDG_CACHE_HOME="/dev/null")
    assert said.startswith("warning: there is no cache folder (/dev/null/empssl_jax: Not a directory): ")
    assert said.count("\n") == 1


def test_a_user_without_a_home_folder_has_no_cache_folder(monkeypatch, capsys):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(compilation.Path, "home", home)
    compilation.user_cache.cache_clear()
    try:
        assert compilation.user_cache() is None
        assert compilation.user_cache() is None
    finally:
        compilation.user_cache.cache_clear()
    said = capsys.readouterr().err
    assert said.count("warning: there is no cache folder (this user has no home folder)") == said.count("\n") == 1


def test_a_traced_step_is_the_same_step_and_leaves_a_trace(tmp_path, capsys):
    step = profiling.with_profiler_trace(lambda state, batch: (state + batch, {"loss": state}), tmp_path)
    state = jnp.float32(0)
    for _ in range(profiling.LAST_STEP + 3):
        state, metrics = step(state, jnp.float32(2))
    assert (float(state), float(metrics["loss"])) == (2.0 * (profiling.LAST_STEP + 3), 2.0 * (profiling.LAST_STEP + 2))
    assert list(tmp_path.rglob("*.xplane.pb"))
    assert str(tmp_path) in capsys.readouterr().out
