"""The online probe: what it measures is correct, and training with it is bit-identical, even across a restart."""

import contextlib
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from synthetic_run import knn_by_numpy
from test_end_to_end import checkpoint_arrays

from empssl_jax import training
from empssl_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, PatchConfig, RunConfig, TrainingConfig
from empssl_jax.data.datasets import Datasets, ImageDataset, load_split
from empssl_jax.evaluation import online_probe as probe
from empssl_jax.method.encoder import encoder_graph, init_encoder
from empssl_jax.method.patches import multi_patch
from empssl_jax.method.random_keys import embedding_patches_key, parameters_key
from empssl_jax.run_folder import step_files as timing
from empssl_jax.run_folder.checkpoints import Checkpoints
from empssl_jax.run_folder.metrics import MetricsWriter
from empssl_jax.runtime import interruption
from empssl_jax.runtime.devices import device_mesh, replicated

CONFIG = Config(
    data=DataConfig(dataset="digits", images_per_class=20, test_images_per_class=10),
    patches=PatchConfig(train_patches=2, patch_size=16),
    model=ModelConfig(width=2, hidden_dim=16, projection_dim=8, precision="float32"),
    training=TrainingConfig(batch_size=40, max_epochs=2),
    evaluation=EvaluationConfig(valid_patches=0, num_neighbours=7, embedding_batch_size=64),
)


def config_in(folder, **options):
    report = dataclasses.replace(CONFIG.evaluation, report=False)
    return dataclasses.replace(CONFIG, evaluation=report, run=RunConfig(workdir=str(folder), **options))


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def mean_features(state, images):
    """The mean hidden features of 16 random patches of each image."""
    patches = multi_patch(embedding_patches_key(CONFIG.training.seed), images, 16, patch_size=16)
    encoder = nnx.merge(encoder_graph(CONFIG.model), *state)
    encoder.eval()
    return np.asarray(encoder.embed(patches.reshape(-1, 16, 16, 3)).reshape(len(images), 16, -1).mean(axis=1))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs: one without a probe, one with it, and one with it that stops after step 5 and resumes."""
    folder = tmp_path_factory.mktemp("runs")
    training.train(config_in(folder / "without"))
    training.train(config_in(folder / "probed", probe_every=3))
    stopped = config_in(folder / "stopped", probe_every=3)
    with pytest.MonkeyPatch.context() as patch:
        stop = contextlib.nullcontext(lambda steps_done: 15 if steps_done == 5 else None)
        patch.setattr(interruption, "stop_requests", lambda: stop)
        with pytest.raises(SystemExit) as ended:
            training.train(stopped)
    assert ended.value.code == 128 + 15
    assert [line["step"] for line in lines_of(folder / "stopped" / "probe.jsonl")] == [3]
    with (folder / "stopped" / "probe.jsonl").open("a") as file:
        # A step that runs again, and an incomplete line.
        file.write('{"step": 6, "seconds": 1e9, "top1": 0.5}\n{"step": 9')
    training.train(stopped)
    return folder


@pytest.mark.parametrize("name", ["probed", "stopped"])
@pytest.mark.long
def test_training_is_bit_identical(runs, name):
    assert (runs / name / "metrics.jsonl").read_bytes() == (runs / "without" / "metrics.jsonl").read_bytes()
    for ours, theirs in zip(checkpoint_arrays(runs / name, 10), checkpoint_arrays(runs / "without", 10), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not (runs / "without" / "probe.jsonl").exists()


@pytest.mark.long
def test_it_measures_at_every_interval_and_at_the_end_even_across_a_restart(runs):
    probed, stopped = (lines_of(runs / name / "probe.jsonl") for name in ("probed", "stopped"))
    assert [line["step"] for line in probed] == [line["step"] for line in stopped] == [3, 6, 9, 10]
    for name in ("top1", "effective_rank"):
        assert [line[name] for line in probed] == [line[name] for line in stopped]
    for lines in (probed, stopped):
        seconds = [line["seconds"] for line in lines]
        assert seconds == sorted(seconds)
    times = lines_of(runs / "stopped" / "timing.jsonl")
    assert [line["step"] for line in times] == list(range(10))
    seconds = [line["seconds"] for line in times]
    assert seconds == sorted(seconds)
    assert seconds[-1] < 1e6


@pytest.mark.long
def test_it_is_knn_on_sixteen_patches_of_the_first_images(runs):
    template = jax.eval_shape(lambda: init_encoder(CONFIG.model, parameters_key(0)))
    with Checkpoints(runs / "probed") as store:
        _, state = store.restore_encoder(template, replicated(device_mesh(1)), "latest")
    embeddings, labels = {}, {}
    for split in ("train", "test"):
        dataset = load_split(CONFIG.data, split, None)
        embeddings[split], labels[split] = mean_features(state, dataset.images), dataset.labels
    predicted = knn_by_numpy(embeddings["test"], embeddings["train"], labels["train"], 7, CONFIG.evaluation.temperature)
    assert lines_of(runs / "probed" / "probe.jsonl")[-1]["top1"] == pytest.approx(
        np.mean(predicted == labels["test"]), abs=0.011
    )


class Recorder:
    """A logger that keeps what it gets."""

    def __init__(self):
        self.logged = []

    def add(self, step, values):
        self.logged.append((step, values))

    def close(self):
        pass


def test_embeddings_that_are_not_finite_do_not_end_training(tmp_path):
    config, train = dataclasses.replace(CONFIG, run=RunConfig(probe_every=1)), load_split(CONFIG.data, "train", None)
    state = init_encoder(CONFIG.model, parameters_key(0))
    broken = state._replace(params=jax.tree.map(lambda x: x * math.nan, state.params))
    with MetricsWriter(tmp_path, 0, 1, 1, (0.0, 1.0)) as writer:
        probe.online_probe(config, Datasets(train, train, train), 1, device_mesh(1))(1, broken, writer)
    (measured,) = lines_of(tmp_path / "probe.jsonl")
    assert set(measured) == {"step", "seconds", "effective_rank"}
    assert math.isnan(measured["effective_rank"])


@pytest.mark.parametrize(
    ("unlabelled", "crops"),
    [((), "random"), (("bank", "test"), "random"), (("bank",), "whole"), (("test",), "whole")],
)
def test_the_rank_needs_no_labels(tmp_path, monkeypatch, unlabelled, crops):
    monkeypatch.setattr(probe, "BANK_SIZE", 60)
    train, test = (load_split(CONFIG.data, split, None) for split in ("train", "test"))
    datasets = Datasets(train, train, test)
    for split in unlabelled:
        held = getattr(datasets, split)
        datasets = datasets._replace(**{split: held._replace(labels=np.full_like(held.labels, -1))})
    if "bank" in unlabelled:
        chosen = np.linspace(0, 199, 60).round().astype(int)
    else:
        chosen = np.sort(np.concatenate([np.flatnonzero(train.labels == label)[:6] for label in range(10)]))
    evaluation = dataclasses.replace(CONFIG.evaluation, valid_crops=crops, valid_patches=1)
    config = dataclasses.replace(CONFIG, evaluation=evaluation, run=RunConfig(probe_every=3))
    state, logger = init_encoder(CONFIG.model, parameters_key(0)), Recorder()
    step = probe.online_probe(config, datasets, 7, device_mesh(1))
    with MetricsWriter(tmp_path, 0, 7, 1, (0.0, 1.0), [logger]) as writer:
        for steps_done in range(1, 8):
            step(steps_done, state, writer)
    lines = lines_of(tmp_path / "probe.jsonl")
    assert [line.pop("step") for line in lines] == [steps_done for steps_done, _ in logger.logged] == [3, 6, 7]
    measured = lines[-1]
    assert set(measured) == {"seconds", "effective_rank"} | (set() if unlabelled else {"top1", "top5"})
    del measured["seconds"]
    assert logger.logged[-1][1] == {f"probe/{name}": value for name, value in measured.items()}
    if crops == "random":
        values = np.linalg.svd(np.float64(mean_features(state, train.images[chosen])), compute_uv=False)
        shares = values / values.sum()
        assert measured["effective_rank"] == pytest.approx(np.prod(shares**-shares), rel=1e-3)


def test_it_takes_equally_many_images_of_each_class():
    labels = np.repeat(np.arange(4), [1, 5, 3, 9]).astype(np.int32)
    dataset = ImageDataset(np.zeros((18, 4, 4, 3), np.uint8), labels, tuple("abcd"))
    assert np.bincount(probe._first_images(dataset, 12).labels).tolist() == [1, 3, 3, 3]
    assert np.bincount(probe._first_images(dataset, 2).labels).tolist() == [1, 1, 1, 1]


def test_the_clock_stands_still_while_something_else_is_measured(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    clock = timing.TrainingClock(start=7.0)
    now[0] += 2
    with clock.paused():
        now[0] += 50
    now[0] += 3
    assert clock.seconds() == 12.0


def test_seconds_continue_from_the_steps_that_are_kept(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    file = timing.TimingFile(tmp_path, 0)
    for step in range(4):
        now[0] += 10
        file.add(step)
    file.close()
    now[0] += 1000
    file = timing.TimingFile(tmp_path, 2)
    now[0] += 5
    file.add(2)
    file.close()
    assert [line["seconds"] for line in lines_of(tmp_path / "timing.jsonl")] == [10, 20, 25]
    assert jnp.isfinite(timing.seconds_so_far(tmp_path))
