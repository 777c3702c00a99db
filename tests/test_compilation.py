"""The cache of compiled programs, and the trace that --profile writes."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp

from empssl_jax import training
from empssl_jax.run_folder.saved_config import load_config
from empssl_jax.runtime import compilation, profiling

PROGRAM = """
from empssl_jax.runtime.compilation import keep_compiled_programs
keep_compiled_programs()
import jax
assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.1
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x * 2 + 1)(3.0)
"""


# Three runs, each with a measurement after it. Prints for each how many programs were built, and how many of these the
# cache of compiled programs lacked.
THREE_RUNS = """
import json, sys
import jax
from empssl_jax import config, training
from empssl_jax.config.command_options import EvaluateOptions
from empssl_jax.evaluation.evaluate import evaluate

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
jax.monitoring.register_event_duration_secs_listener(lambda event, duration, **_: events.append(event))

def run(number, linear, **options):
    events.clear()
    evaluation = config.EvaluationConfig(
        valid_patches=16, embedding_batch_size=80, linear_epochs=2, report=False, untrained=True, **linear
    )
    made = config.Config(
        data=config.DataConfig(dataset="digits", images_per_class=8, test_images_per_class=1),
        patches=config.PatchConfig(train_patches=2, patch_size=16),
        model=config.ModelConfig(width=4, hidden_dim=32, projection_dim=16, precision="float32"),
        training=config.TrainingConfig(batch_size=40, **options),
        evaluation=evaluation,
        run=config.RunConfig(workdir=f"{sys.argv[1]}/{number}", probe_every=2),
    )
    training.train(made)
    evaluate(EvaluateOptions(workdir=made.run.workdir, evaluation=evaluation), lambda *_: None)
    built = sum("backend_compile" in event for event in events)
    missed = sum("cache_miss" in event for event in events)
    print(json.dumps({"built": built, "missed": missed}), flush=True)

run(1, {})
other = dict(learning_rate=0.1, weight_decay=1e-3, momentum=0.5, trust_coefficient=0.01, invariance_coefficient=100.0)
other |= dict(coding_rate_eps=0.3, seed=7, max_epochs=2, warmup_epochs=0.5, schedule="linear")
run(2, dict(linear_learning_rate=0.1, linear_weight_decay=1e-3), **other)
jax.clear_caches()
run(3, {}, learning_rate=0.2, seed=8, max_epochs=3)
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
    step = profiling.with_profiler_trace(lambda state, batch: (state + batch, {"loss": state}), tmp_path, 16)
    state = jnp.float32(0)
    for _ in range(profiling.LAST_STEP + 3):
        state, metrics = step(state, jnp.float32(2))
    assert (float(state), float(metrics["loss"])) == (2.0 * (profiling.LAST_STEP + 3), 2.0 * (profiling.LAST_STEP + 2))
    assert list(tmp_path.rglob("*.xplane.pb"))
    assert str(tmp_path) in capsys.readouterr().out


def test_a_run_with_few_steps_left_resumes_without_a_trace(tiny_run, tmp_path, capsys):
    workdir = shutil.copytree(tiny_run, tmp_path / "run")
    saved = load_config(workdir)
    run = dataclasses.replace(saved.run, workdir=str(workdir), profile=True)
    training.train(dataclasses.replace(saved, run=run))
    said = capsys.readouterr().out
    assert f"resuming {workdir} at step 2 of 2" in said
    assert "no trace is written: it would end after 16 steps, and the run has only 0 steps left" in said
    assert not (workdir / "profile").exists()


def test_a_run_with_other_numbers_compiles_nothing(tmp_path):
    """Neither in the same process nor, with the cache of compiled programs, in another one."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "XLA_FLAGS": ""}  # one device
    command = [sys.executable, "-c", THREE_RUNS, str(tmp_path)]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    first, second, third = (json.loads(line) for line in output.splitlines() if line.startswith('{"built"'))
    assert first["missed"] > 5
    assert second == {"built": 0, "missed": 0}
    assert third["built"] > 5  # forgotten by the process, and read from the cache
    assert third["missed"] == 0
