"""Several processes on one machine, joined by CPU collectives, give the results of one, even if one is lost."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic_run import CONFIG, datasets
from test_end_to_end import DIGITS, REPOSITORY, arrays_of, checkpoint_arrays

from empssl_jax import training as run_training
from empssl_jax.config import Config, DistributedConfig, EvaluationConfig
from empssl_jax.config.command_options import EvaluateOptions
from empssl_jax.config.errors import StorageError, UserError
from empssl_jax.data.batches import shuffled_batches
from empssl_jax.data.datasets import ImageDataset
from empssl_jax.evaluation import knn, linear
from empssl_jax.evaluation.embeddings import LabelledEmbeddings
from empssl_jax.evaluation.evaluate import evaluate
from empssl_jax.run_folder.results import add_results, load_results
from empssl_jax.run_folder.saved_config import from_json, to_json
from empssl_jax.runtime import distributed
from empssl_jax.runtime.devices import device_mesh
from tests.stress.faults import NOT_INHERITED

# At this small learning rate, later steps do not amplify the rounding of earlier ones, and all steps can be compared.
# Only gradients jump now and then: the flat margins of digits move thousands of equal pixels across a ReLU at once.
OPTIONS = [*DIGITS, "--max-epochs", "3", "--learning-rate", "1e-7", "--max-to-keep", "20"]
JUMPS = 5e-2  # up to 2.1e-2 was seen, depending on the processor
STEPS = 15
RESUMES = "Start all processes again with the same command: training resumes"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a script in `processes` processes of `devices` devices each. All share one compilation cache."""
    started = []
    environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONUNBUFFERED": "1"}

    def start_processes(*command, processes=1, devices=1, slurm=False):
        job = []
        for number in range(processes):
            joining = slurm_variables if slurm else options_for_joining
            variables, arguments = joining(processes, number)
            variables["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": REPOSITORY}
            command_line = [sys.executable, *map(str, command), *arguments]
            job.append(subprocess.Popen(command_line, env=environment | variables, **pipes))
        started.extend(job)
        return job

    port = free_port()

    def options_for_joining(processes, number):
        address = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(processes), "--process-id", str(number)]
        return {}, address if processes > 1 else []

    def slurm_variables(processes, number):
        names = {"JOB_ID": 1, "STEP_NODELIST": "127.0.0.1", "NTASKS": processes, "PROCID": number, "LOCALID": number}
        return {f"SLURM_{name}": str(value) for name, value in names.items()} | {"JAX_COORDINATOR_PORT": str(port)}, []

    yield start_processes
    for process in started:
        process.kill()
        process.communicate()


def training(workdir, *options):
    return ["train.py", *OPTIONS, "--workdir", workdir, *options]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def read_until(stream, text):
    """Reads a process's output line by line until one contains the text."""
    lines = []
    while not (lines and text in lines[-1]):
        lines.append(stream.readline())
        assert lines[-1], f"ended before {text!r}: {''.join(lines)}"


def finish(job):
    """Waits for all processes; returns their exit codes, outputs and errors."""
    outputs, errors = zip(*(process.communicate(timeout=100) for process in job), strict=True)
    return [process.returncode for process in job], outputs, errors


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """The folder of a complete run by one process with one device."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    codes, _, errors = finish(start(*training(workdir)))
    assert codes == [0], errors
    return workdir


def assert_equal_runs(ours, theirs):
    """Compares losses, parameters, the optimizer's accumulated gradients and embeddings, up to rounding."""
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (ours, theirs)
    ]
    assert [line["step"] for line in lines[0]] == list(range(STEPS))
    for name in ("loss", "coding_rate", "similarity", "parameter_norm", "update_norm"):
        a, b = ([line[name] for line in run] for run in lines)
        np.testing.assert_allclose(a, b, rtol=JUMPS if name == "update_norm" else 1e-5, err_msg=name)
        assert a[0] == pytest.approx(b[0], rel=1e-5)
    # Biases are the smallest parameters: they start at 0, and gradients move them to 1e-5.
    for item, tolerance, smallest in (("encoder", 1e-5, 1e-2), ("optimizer", JUMPS, 0.0)):
        arrays = (checkpoint_arrays(folder, STEPS, item) for folder in (ours, theirs))
        for a, b in zip(*arrays, strict=True):
            assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), smallest), item
    for split in ("train", "test"):
        a, b = (arrays_of(folder / "embeddings" / f"{split}.npz") for folder in (ours, theirs))
        # Parameters that differ by 1e-5 move embeddings of four layers by a few times that.
        np.testing.assert_allclose(a["embeddings"], b["embeddings"], rtol=0, atol=1e-4 * np.max(b["embeddings"]))
        np.testing.assert_array_equal(a["labels"], b["labels"])
    a, b = (json.loads((folder / "results.json").read_text())["kNN"] for folder in (ours, theirs))
    for name in ("top1", "top5"):
        # One image of a hundred may lie between two classes.
        assert a.pop(name) == pytest.approx(b.pop(name), abs=0.011)
    assert a == b
    configs = [from_json((folder / "config.json").read_text(), folder) for folder in (ours, theirs)]
    assert configs[0].training == configs[1].training


@pytest.mark.long
def test_two_processes_of_two_devices_survive_a_loss_stop_together_and_equal_one_process(start, alone, tmp_path):
    """Three jobs use one folder. The second gets SIGTERM while it compiles; its processes save after the next step."""
    job = start(*training(tmp_path, "--step-timeout", 8), processes=2, devices=2)
    read_until(job[0].stderr, "step 7/15")
    job[1].send_signal(signal.SIGSTOP)
    codes, _, errors = finish(job[:1])
    assert codes == [distributed.LOST], errors
    assert "process 0 of 2 has finished no step for 8 seconds (--step-timeout)" in errors[0]
    assert RESUMES in errors[0]

    job = start(*training(tmp_path), processes=2, devices=2, slurm=True)
    read_until(job[0].stdout, f"resuming {tmp_path} at step")
    job[1].send_signal(signal.SIGTERM)
    codes, outputs, errors = finish(job)
    assert codes == [143, 143], errors
    stopped = int(outputs[0].split("stopped and saved at step ")[1].split()[0])
    assert 4 <= stopped < STEPS

    codes, outputs, errors = finish(start(*training(tmp_path), processes=2, devices=2, slurm=True))
    assert codes == [0, 0], errors
    assert f"resuming {tmp_path} at step {stopped} of 15" in outputs[0]
    assert_equal_runs(tmp_path, alone)
    assert "kNN" in outputs[0]
    assert "step 15/15" in errors[0]
    # Only the first process prints.
    assert [line for line in outputs[1].splitlines() if "Gloo" not in line] == []
    assert "step" not in errors[1]


@pytest.mark.long
def test_four_processes_resume_the_run_of_one_lose_one_and_one_resumes_theirs(start, alone, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(alone, workdir)
    for folder in (workdir / "checkpoints").iterdir():
        if folder.name.isdigit() and int(folder.name) > 3:
            shutil.rmtree(folder)
    job = start(*training(workdir), processes=4)
    read_until(job[0].stdout, f"resuming {workdir} at step 3 of 15")
    read_until(job[0].stderr, "step 8/15")
    job[3].kill()
    codes, _, errors = finish(job)
    # The process that loses its connection first reports it and exits. If it is process 0, JAX aborts the others.
    assert codes[3] == -signal.SIGKILL
    assert set(codes[:3]) <= {distributed.LOST, -signal.SIGABRT}, errors
    assert "lost another process" in "".join(errors)
    assert RESUMES in "".join(errors)

    codes, outputs, errors = finish(start(*training(workdir)))
    assert codes == [0], errors
    resumed = int(outputs[0].split(f"resuming {workdir} at step ")[1].split()[0])
    assert resumed >= 5  # the four saved after steps 5 and 6, the latter perhaps incompletely
    assert_equal_runs(workdir, alone)


@pytest.mark.long
def test_two_processes_measure_what_one_does(start, alone, tmp_path):
    folders = [shutil.copytree(alone / "embeddings", tmp_path / name) for name in ("ours", "theirs")]
    options = EvaluationConfig(linear_epochs=5, logistic=True)
    arguments = "--embeddings", folders[0], "--linear-epochs", options.linear_epochs, "--logistic"
    codes, outputs, errors = finish(start("eval.py", *arguments, processes=2, devices=2))
    assert codes == [0, 0], errors
    evaluate(EvaluateOptions(embeddings=str(folders[1]), evaluation=options), write_report=lambda *_: None)
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in folders)
    assert set(ours) == {"kNN", "effective rank", "linear", "linear, best epoch on test", "logistic"}
    for name, accuracy in ours.items():
        assert accuracy == pytest.approx(theirs[name], abs=0.011), name
    assert "linear" in outputs[0]
    assert "linear" not in outputs[1]


REFUSED = {
    "a process without coordinator": ({"process_id": 1}, "--process-id is 1: give --coordinator"),
    "a number without coordinator": ({"num_processes": 2}, "--num-processes is 2: give --coordinator"),
    "no number": ({"coordinator": "a:1", "process_id": 0}, "--coordinator is 'a:1': give --num-processes and"),
    "no process": ({"coordinator": "a:1", "num_processes": 2}, "--coordinator is 'a:1': give --num-processes and"),
    "no port": ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "--coordinator is 'a': give HOST:PORT"),
    "a high port": ({"coordinator": "a:65536", "num_processes": 2, "process_id": 0}, "'a:65536': give HOST:PORT"),
    "a high process": ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "--process-id is 2: with --num-p"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_combinations_are_refused(case):
    options, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        DistributedConfig(**options)


def test_the_processes_are_not_part_of_the_saved_run():
    config = Config(distributed=DistributedConfig("a:1", 2, 1))
    assert from_json(to_json(config), "text") == Config()


@pytest.mark.parametrize(
    ("config", "called"),
    [
        (DistributedConfig(), [()]),
        (DistributedConfig(num_processes=1), []),
        (DistributedConfig("a:1", 3, 2), [("a:1", 3, 2)]),
    ],
)
def test_jax_is_asked_for_a_cluster_only_where_the_options_leave_it_open(config, called, monkeypatch):
    """The fake `initialize` behaves as on a single machine, where JAX finds no cluster."""
    calls = []

    def initialize(*address, heartbeat_timeout_seconds, shutdown_timeout_seconds, cluster_detection_method=None):
        calls.append(address)
        if not address:
            raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with distributed.processes(config):
        pass
    assert calls == called


def test_a_process_that_has_used_jax_is_told_to_run_alone():
    """As in a notebook. The error is JAX's own."""
    jax.devices()
    remedy = "run the command in a process of its own, or give --num-processes 1"
    with (
        pytest.raises(UserError, match=f"^--num-processes is not given, and .* used JAX, .*: {remedy}\\.$"),
        distributed.processes(DistributedConfig()),
    ):
        pass
    with distributed.processes(DistributedConfig(num_processes=1)):
        pass


def test_a_cluster_that_cannot_be_joined_is_named(monkeypatch):
    def initialize(**timeouts):
        raise RuntimeError("no permission to read pods")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with (
        pytest.raises(UserError, match=r"no permission.*--num-processes 1 to run alone"),
        distributed.processes(DistributedConfig()),
    ):
        pass


LOST_ONE = ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer\nmore")  # as JAX raises it


def chained(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LOST_ONE, distributed.LOST),
        (jax.errors.JaxRuntimeError(str(LOST_ONE)), distributed.LOST),
        (chained(StorageError("A checkpoint could not be saved."), LOST_ONE), distributed.LOST),
        (UserError("--workdir /x/nccl-test has no config.json."), None),
        (chained(StorageError("no"), OSError(28, "No space left on device", "/x/nccl-test/results.json")), None),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), None),
    ],
)
def test_only_errors_of_collective_operations_mean_a_lost_process(error, code, monkeypatch, capsys):
    """Scripts start the processes again after this exit code, which would not help against other errors."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", sys.exit)
    raised = SystemExit if code else type(error)
    with pytest.raises(raised) as caught, distributed.processes(DistributedConfig(num_processes=1)):
        raise error
    assert getattr(caught.value, "code", None) == code
    said = "lost another process (UNKNOWN: Gloo AllGather failed: Connection reset by peer). Start all"
    assert (said in capsys.readouterr().err) == bool(code)


def test_the_others_do_not_wait_for_a_first_process_that_failed(monkeypatch):
    reached = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.multihost_utils, "sync_global_devices", reached.append)
    with pytest.raises(UserError, match="no data"), distributed.first_process_first():
        raise UserError("no data")
    assert len(reached) == 1


@pytest.mark.parametrize("number", [0, 1])
def test_no_process_looks_for_the_untrained_baseline_before_the_first_has_dropped_old_results(
    number, monkeypatch, tmp_path
):
    """The baseline is stale. A process that found it would not take part in measuring it."""
    add_results(tmp_path, {"kNN before training": {"top1": 0.5, "top5": 0.5}})
    waited = []
    monkeypatch.setattr(distributed, "is_first_process", lambda: number == 0)
    monkeypatch.setattr(run_training, "is_first_process", lambda: number == 0)
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def sync(name):
        waited.append(set(load_results(tmp_path)))
        if number == 1:
            (tmp_path / "results.json").unlink()  # by the first process

    def measure_untrained(*args):
        assert load_results(tmp_path) == {}
        raise SystemExit

    monkeypatch.setattr(distributed.multihost_utils, "sync_global_devices", sync)
    monkeypatch.setattr(run_training, "measure_untrained", measure_untrained)
    config = dataclasses.replace(CONFIG, evaluation=dataclasses.replace(CONFIG.evaluation, untrained=True))
    with pytest.raises(SystemExit):
        run_training._complete_run(config, datasets(), None, run_training.Steps(5, 5), device_mesh(1), tmp_path)
    assert waited == [set() if number == 0 else {"kNN before training"}]


def blobs(size, dim):
    """Embeddings around ten centres."""
    random = np.random.default_rng(size)
    labels = random.integers(0, 10, size).astype(np.int32)
    centres = np.random.default_rng(0).standard_normal((10, dim))
    return LabelledEmbeddings(
        np.float32(centres[labels] + random.standard_normal((size, dim))), labels, tuple("0123456789")
    )


def test_knn_and_the_linear_classifier_have_the_same_numbers_on_eight_devices():
    train, test = blobs(203, 13), blobs(101, 13)  # neither size is a multiple of eight
    options = {"num_classes": 10, "num_neighbours": 7, "temperature": 0.07}
    config = EvaluationConfig(linear_epochs=4, linear_batch_size=30)
    scores, accuracies = [], []
    for devices in (1, 8):
        mesh = device_mesh(devices)
        scores.append(knn.sharded_knn_scores(mesh, test.embeddings, train.embeddings, train.labels, **options))
        accuracies.append(linear.linear_accuracy(jax.random.key(0), train, test, config, mesh))
    assert scores[1].shape == (101, 10)
    np.testing.assert_allclose(*scores, rtol=1e-5)
    np.testing.assert_allclose(accuracies[0].top1, accuracies[1].top1, atol=1.5 / 101)
    plain = knn.knn_scores(*map(jnp.asarray, (test.embeddings, train.embeddings, train.labels)), **options)
    np.testing.assert_allclose(scores[1], plain, rtol=1e-5)


def test_batches_of_rows_are_the_rows_of_batches():
    dataset = blobs_as_images()
    batches = list(shuffled_batches(dataset, 8, 42, 0, 9))
    parts = [list(shuffled_batches(dataset, 8, 42, 0, 9, rows)) for rows in (np.arange(2), np.array([2, 5]))]
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(parts[0][step].indices, batch.indices[:2])
        np.testing.assert_array_equal(parts[1][step].indices, batch.indices[[2, 5]])
        np.testing.assert_array_equal(parts[1][step].images, batch.images[[2, 5]])


def blobs_as_images():
    images = np.random.default_rng(0).integers(0, 256, (30, 4, 4, 3), np.uint8)
    return ImageDataset(images, np.zeros(30, np.int32), ("any",))
