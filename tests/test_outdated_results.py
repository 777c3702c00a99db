"""Training removes results of another run, of an earlier checkpoint or of other test images from results.json."""

import dataclasses
import shutil

import numpy as np
import pytest
from synthetic_run import CONFIG, datasets

from empssl_jax import command_line, training
from empssl_jax.evaluation import untrained_baseline
from empssl_jax.run_folder.results import add_results, load_results
from empssl_jax.run_folder.saved_config import load_config
from empssl_jax.runtime.devices import device_mesh

ANY = {"top1": 0.5, "top5": 0.75}


@pytest.fixture
def run(tiny_run, tmp_path):
    """A complete run of two steps, each saved, with other results."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    earlier, elsewhere = ANY | {"step": 1}, ANY | {"step": 2, "dataset": "other"}
    add_results(run, {"linear": earlier, "other: linear": elsewhere, "logistic": ANY | {"step": 2}})
    return run


def train(run, **changes):
    """Runs `empssl train` again, with changes to groups of its config; returns the names of the results."""
    config = load_config(run)
    groups = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()}
    run_options = dataclasses.replace(config.run, workdir=str(run))
    training.train(dataclasses.replace(config, **{"run": run_options} | groups))
    return set(load_results(run)) - {"kNN", "effective rank"}


def test_results_of_earlier_checkpoints_leave_when_training_continues(run, capsys):
    assert train(run) == {"linear", "other: linear", "logistic"}
    shutil.rmtree(run / "checkpoints" / "2")
    assert train(run) == {"other: linear", "logistic"}
    assert f"{run / 'results.json'} no longer has results of earlier checkpoints: linear\n" in capsys.readouterr().out


def test_results_of_earlier_checkpoints_leave_if_training_stops_after_its_last_step(run, monkeypatch):
    shutil.rmtree(run / "checkpoints" / "2")
    fit = training._fit

    def fit_and_stop(*args):
        fit(*args)
        raise SystemExit(143)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_fit", fit_and_stop)
        with pytest.raises(SystemExit):
            train(run)
    assert train(run) == {"other: linear", "logistic"}


def test_results_of_an_imported_run_are_those_of_an_earlier_checkpoint(run, tmp_path, capsys):
    imported = tmp_path / "imported"
    command_line.main(["export", str(run)])
    command_line.main(["import", str(run / "weights.safetensors"), "--workdir", str(imported)])
    add_results(imported, {"linear": ANY | {"step": 0}})
    assert train(imported) == set()
    said = f"{imported / 'results.json'} no longer has results of earlier checkpoints: linear\n"
    assert said in capsys.readouterr().out


def test_results_of_other_test_images_leave(run, capsys):
    assert train(run, data={"test_images_per_class": 2}) == {"other: linear"}
    names = "effective rank, kNN, linear, logistic"
    assert f"no longer has results of other test images: {names}\n" in capsys.readouterr().out
    assert load_results(run)["effective rank"]["images"] == 20


def test_results_of_a_run_that_left_no_checkpoint_leave(run):
    shutil.rmtree(run / "checkpoints")
    assert train(run, training={"seed": 3}) == set()


def test_no_untrained_encoder_is_made_for_images_without_labels(tmp_path, monkeypatch, capsys):
    """No accuracy could be measured of it."""
    images = datasets()
    unlabelled = images._replace(test=images.test._replace(labels=np.full_like(images.test.labels, -1)))
    monkeypatch.setattr(untrained_baseline, "make_train_step", lambda *args: pytest.fail("it was made"))
    untrained_baseline.measure_untrained(CONFIG, unlabelled, device_mesh(1), tmp_path)
    assert load_results(tmp_path) == {}
    assert capsys.readouterr().out == "no test image has a label: kNN and linear are not measured\n"


def test_the_untrained_baseline_is_measured_again_only_with_other_options(run):
    name = "kNN before training"
    train(run, evaluation={"untrained": True})
    measured = load_results(run)[name]
    assert measured["options"] == {"num_neighbours": 20, "temperature": 0.07}
    for options in ({}, {"linear_epochs": 3}):
        add_results(run, {name: measured | {"top1": 2.0}})
        train(run, evaluation=options)
        assert load_results(run)[name]["top1"] == 2.0
    for options in ({"num_neighbours": 3}, {"valid_patches": 1}):
        add_results(run, {name: measured | {"top1": 2.0}})
        train(run, evaluation=options)
        assert load_results(run)[name]["top1"] <= 1
