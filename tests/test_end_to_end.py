"""train.py and eval.py as a user runs them: complete runs, interrupted runs, and refused input."""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from empssl_jax.runtime import compilation, distributed, interruption, user_errors
from tests.stress.faults import NOT_INHERITED

REPOSITORY = Path(__file__).parent.parent
TINY = [
    *("--width", "4", "--hidden-dim", "32", "--projection-dim", "16", "--patch-size", "16", "--train-patches", "4"),
    *("--batch-size", "40", "--images-per-class", "20", "--test-images-per-class", "10", "--valid-patches", "2"),
    *("--embedding-batch-size", "64", "--linear-epochs", "5", "--checkpoint-every", "3", "--no-untrained"),
    "--no-report",
]
DIGITS = ["--config", "configs/digits.py", *TINY]


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """One compilation cache for all processes, which run the same small programs."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {name: value for name, value in os.environ.items() if name not in NOT_INHERITED} | cache


@pytest.fixture
def run(environment):
    """Runs a script of the repository; returns the finished process."""

    def run_script(script, *options):
        command = [sys.executable, script, *map(str, options)]
        return subprocess.run(command, cwd=REPOSITORY, env=environment, text=True, capture_output=True, timeout=500)

    return run_script


def arrays_of(path):
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def checkpoint_arrays(workdir, step, *items):
    """Every array of a checkpoint's items (default: all), restored by Orbax from shapes alone."""
    import jax
    import orbax.checkpoint as ocp

    arrays = []
    for item in items or ("encoder", "optimizer"):
        folder, checkpointer = workdir.absolute() / "checkpoints" / str(step) / item, ocp.StandardCheckpointer()
        there = checkpointer.metadata(folder).item_metadata.tree
        restored = checkpointer.restore(folder, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), there))
        arrays += jax.tree.leaves(restored)
    return [np.asarray(array) for array in arrays]


@pytest.fixture(scope="module")
def uninterrupted(environment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    command = [sys.executable, "train.py", *DIGITS, "--max-epochs", "4", "--report", "--workdir", str(workdir)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_a_run_leaves_metrics_embeddings_results_and_events(uninterrupted):
    workdir, done = uninterrupted
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(20))
    assert all(0 <= line["coding_rate_fraction"] <= 1 for line in lines)
    assert lines[0]["learning_rate"] == pytest.approx(0.3)
    for split, size in (("train", 200), ("test", 100)):
        arrays = arrays_of(workdir / "embeddings" / f"{split}.npz")
        assert arrays["embeddings"].shape == (size, 32)
        assert arrays["embeddings"].dtype == np.float32
        np.testing.assert_array_equal(np.bincount(arrays["labels"]), np.full(10, size // 10))
    assert 0 < json.loads((workdir / "results.json").read_text())["kNN"]["top1"] <= 1
    assert list((workdir / "tensorboard").glob("events.*"))
    assert "kNN" in done.stdout
    assert "step 20/20" in done.stderr
    assert f"wrote {workdir / 'report.html'}" in done.stdout
    assert "Linear accuracy" not in (workdir / "report.html").read_text()


def test_evaluation_repeats_training_s_embeddings_and_adds_the_linear_classifier(uninterrupted, run):
    workdir, _ = uninterrupted
    before = arrays_of(workdir / "embeddings" / "test.npz")
    results = json.loads((workdir / "results.json").read_text())
    for split in ("train", "test"):  # or they would be read instead of computed again
        (workdir / "embeddings" / f"{split}.npz").unlink()
    done = run("eval.py", "--workdir", workdir)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(before["embeddings"], arrays_of(workdir / "embeddings" / "test.npz")["embeddings"])
    after = json.loads((workdir / "results.json").read_text())
    assert results["kNN"].items() <= after["kNN"].items()
    assert {"linear", "linear, best epoch on test"} <= set(after)
    assert f"<dd>{100 * after['linear']['top1']:.1f} %</dd>" in (workdir / "report.html").read_text()
    again = run("eval.py", "--embeddings", workdir / "embeddings", "--linear-epochs", 5)
    given = json.loads((workdir / "embeddings" / "results.json").read_text())["linear"]
    assert {name: given[name] for name in ("top1", "top5")}.items() <= after["linear"].items(), again.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.long
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    uninterrupted, environment, run, tmp_path, number, code
):
    expected, _ = uninterrupted
    workdir = tmp_path / "interrupted"
    options = [*DIGITS, "--max-epochs", "4", "--workdir", str(workdir)]
    process = subprocess.Popen(
        [sys.executable, "train.py", *options], cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE
    )
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == code
    assert "the same command resumes there" in output
    stopped = int(output.split("stopped and saved at step ")[1].split()[0])
    assert 2 <= stopped < 20
    done = run("train.py", *options)
    assert done.returncode == 0, done.stderr
    assert f"resuming {workdir} at step {stopped} of 20" in done.stdout
    assert metrics.read_text() == (expected / "metrics.jsonl").read_text()
    for ours, theirs in zip(checkpoint_arrays(workdir, 20), checkpoint_arrays(expected, 20), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for split in ("train", "test"):
        ours, theirs = (arrays_of(path / "embeddings" / f"{split}.npz") for path in (workdir, expected))
        np.testing.assert_array_equal(ours["embeddings"], theirs["embeddings"])


@pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="TFDS_DATA_DIR is not set")
@pytest.mark.long
def test_cifar10_without_tensorflow(environment, tmp_path):
    code = f"""
import sys
from pathlib import Path
from empssl_jax.config.config_files import parse_train_options
from empssl_jax.evaluation.evaluate import evaluate
from empssl_jax.report.write_report import try_to_report
from empssl_jax.parse_options import parse_evaluate_options
from empssl_jax.training import train
train(parse_train_options({TINY!r} + ["--workdir", {str(tmp_path)!r}]))
evaluate(parse_evaluate_options(["--workdir", {str(tmp_path)!r}, "--step", "best"]), try_to_report)
assert "tensorflow" not in sys.modules
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr
    expected = {"kNN", "effective rank", "linear", "linear, best epoch on test"}
    assert set(json.loads((tmp_path / "results.json").read_text())) == expected


def save_npz(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


def embeddings_folder(tmp_path, **wrong):
    """Writes embeddings whose test split has the wrong arrays; returns the options that evaluate them."""
    good = {"embeddings": np.eye(4, dtype=np.float32), "labels": np.arange(4)}
    save_npz(tmp_path / "train.npz", **good)
    save_npz(tmp_path / "test.npz", **(good | wrong))
    return ["--embeddings", tmp_path, "--num-neighbours", 3]


def without_test_split(tmp_path):
    options = embeddings_folder(tmp_path)
    (tmp_path / "test.npz").unlink()
    return options


def with_bytes(tmp_path):
    options = embeddings_folder(tmp_path)
    (tmp_path / "test.npz").write_bytes(b"no archive")
    return options


def with_a_pickle(tmp_path):
    return embeddings_folder(tmp_path, labels=np.array([{}, {}, {}, {}], dtype=object))


NAN = np.full((4, 4), np.nan, np.float32)
REFUSED = {
    "no run": ("eval.py", lambda t: ["--workdir", t / "none"], "has no config.json"),
    "no test split": ("eval.py", without_test_split, "there is no"),
    "NaN": ("eval.py", lambda t: embeddings_folder(t, embeddings=NAN), "not finite"),
    "no archive": ("eval.py", with_bytes, "cannot be read"),
    "a pickle": ("eval.py", with_a_pickle, "cannot be read"),
    "wrong shapes": ("eval.py", lambda t: embeddings_folder(t, labels=np.arange(3)), "labels of shape (3,)"),
    "unequal dimensions": ("eval.py", lambda t: embeddings_folder(t, embeddings=np.eye(4, 3)), "dimensions [4, 3]"),
    "too many neighbours": (
        "eval.py",
        lambda t: [*embeddings_folder(t), "--num-neighbours", 5],
        "more than the 4 labelled",
    ),
    "no config file": ("train.py", lambda t: ["--config", t / "none.py"], "cannot be used"),
    "a negative rate": ("train.py", lambda t: [*DIGITS, "--learning-rate", -1], "--learning-rate is -1.0: give a"),
    "a large batch": (
        "train.py",
        lambda t: [*DIGITS, "--workdir", t / "r", "--batch-size", 1000],
        "more than the 200 training",
    ),
    "an unknown data set": (
        "train.py",
        lambda t: ["--dataset", "none", "--workdir", t / "r", "--batch-size", 80],
        "not known to TFDS",
    ),
    "a short profile": ("train.py", lambda t: [*DIGITS, "--workdir", t / "r", "--profile"], "has only 5 steps, so"),
    "a file as workdir": ("train.py", lambda t: [*DIGITS, "--workdir", __file__], "cannot be written to"),
    "an unknown option": ("train.py", lambda t: ["--batchsize", 3], "Unrecognized"),
}


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs a script in this process, which is faster than a new one; returns its exit code and stderr."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(compilation, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr(distributed, "processes", contextlib.nullcontext)
    monkeypatch.setattr(interruption, "end_at_sigterm", lambda: None)
    monkeypatch.setattr(user_errors, "_silence_background_threads", lambda: None)

    def run_script(script, *options):
        monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
        return ended.value.code, capsys.readouterr().err

    return run_script


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gets_an_error_message_and_exit_code_2(case, run_here, tmp_path):
    script, options, message = REFUSED[case]
    code, said = run_here(script, *options(tmp_path))
    assert code == 2
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize("case", ["no run", "no config file"])
def test_bad_input_leaves_no_traceback(case, run, tmp_path):
    script, options, message = REFUSED[case]
    done = run(script, *options(tmp_path))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_another_run_s_folder_is_refused(uninterrupted, run_here):
    workdir, _ = uninterrupted
    code, said = run_here(
        "train.py", *DIGITS, "--workdir", workdir, "--max-epochs", 4, "--learning-rate", 0.1, "--width", 8
    )
    assert code == 2
    assert "holds another run: --width 8 (was 4), --learning-rate 0.1 (was 0.3)" in said


@pytest.mark.long
def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(run, tmp_path):
    options = [*DIGITS, "--workdir", tmp_path, "--max-epochs", 4, "--checkpoint-every", 1]
    # At this learning rate, weight decay multiplies the weights by -1e9 in each step.
    done = run("train.py", *options, "--learning-rate", 1e9, "--trust-coefficient", 1e9, "--weight-decay", 1)
    assert done.returncode == 1
    assert "error: Step" in done.stderr
    assert "Traceback" not in done.stderr
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    named = int(done.stderr.split("error: Step ")[1].split()[0])
    assert not steps or steps[-1] <= named
