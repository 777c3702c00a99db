"""Classifiers on a fraction of the labels, compared with the same classifiers on a subset chosen by hand."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from empssl_jax.config import EvaluationConfig, LabelConfig
from empssl_jax.config.errors import UserError
from empssl_jax.evaluation import embeddings
from empssl_jax.evaluation import evaluate as evaluation
from empssl_jax.evaluation.embedding_files import save_embeddings
from empssl_jax.evaluation.embeddings import Embeddings, LabelledEmbeddings
from empssl_jax.evaluation.evaluate import evaluate, measure_knn, measure_linear, measure_logistic
from empssl_jax.evaluation.few_labels import chosen_rows
from empssl_jax.evaluation.whitening import whitened
from empssl_jax.parse_options import parse_evaluate_options
from empssl_jax.report.findings import examine
from empssl_jax.runtime.devices import device_mesh

SIZES = {0: 200, 1: 30, 2: 14, 3: 1}  # images of each class; further images have no label


def labels(seed=0):
    ordered = np.concatenate([np.full(size, label) for label, size in (SIZES | {-1: 25}).items()])
    return np.random.default_rng(seed).permutation(ordered).astype(np.int32)


@pytest.mark.parametrize(
    ("fraction", "counts"),
    [(1.0, [200, 30, 14, 1]), (0.1, [20, 3, 1, 1]), (0.05, [10, 2, 1, 1]), (1e-9, [1, 1, 1, 1])],
)
def test_each_class_keeps_the_nearest_number_of_images_but_at_least_one(fraction, counts):
    """0.1 * 14 = 1.4 and 0.05 * 30 = 1.5, which rounds to the even 2."""
    chosen = chosen_rows(labels(), LabelConfig(fraction))
    np.testing.assert_array_equal(np.bincount(labels()[chosen]), counts)
    np.testing.assert_array_equal(chosen, np.unique(chosen))


def test_a_choice_depends_on_the_seed_and_on_no_unlabelled_image_and_is_part_of_larger_ones():
    given = labels()
    of_seed = [set(chosen_rows(given, LabelConfig(0.1, seed)).tolist()) for seed in (0, 0, 1)]
    assert of_seed[0] == of_seed[1] != of_seed[2]
    smaller = set(chosen_rows(given, LabelConfig(0.03)).tolist())
    assert len(smaller) == 6 + 1 + 1 + 1
    assert smaller < of_seed[0] < set(chosen_rows(given, LabelConfig(0.5)).tolist())
    labelled = np.flatnonzero(given >= 0)
    alone = labelled[chosen_rows(given[labelled], LabelConfig(0.1))]
    assert set(alone.tolist()) == of_seed[0]


def test_images_are_chosen_uniformly():
    """Over 300 seeds, each of 40 images is among the 10 chosen with probability 1/4, standard deviation 0.025."""
    times = np.zeros(40)
    for seed in range(300):
        times[chosen_rows(np.zeros(40, np.int32), LabelConfig(0.25, seed))] += 1
    assert times.sum() == 3000
    assert np.all(np.abs(times / 300 - 0.25) < 0.11)


def blobs(given, seed):
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(9).standard_normal((4, 8))
    embeddings = centres[given] + 1.5 * random.standard_normal((len(given), 8))
    return LabelledEmbeddings(np.float32(embeddings), given, ("a", "b", "c", "d"))


@pytest.mark.parametrize("measure", ["kNN", "linear", "logistic"])
def test_measures_equal_those_of_the_chosen_images_alone(measure):
    bank, test = blobs(labels(), 1), blobs(labels(2), 2)
    few = EvaluationConfig(num_neighbours=5, linear_epochs=5, label_fraction=0.1, label_seed=3)
    rows = chosen_rows(bank.labels, few)
    subset = LabelledEmbeddings(bank.embeddings[rows], bank.labels[rows], bank.class_names)
    mesh, everything = device_mesh(1), dataclasses.replace(few, label_fraction=1.0)
    measures = {
        "kNN": lambda both, options: measure_knn(both, options, mesh),
        "linear": lambda both, options: measure_linear(both, options, 7, mesh),
        "logistic": lambda both, options: measure_logistic(both, options, mesh),
    }
    accuracy = measures[measure](Embeddings(bank, test), few)
    assert accuracy == measures[measure](Embeddings(subset, test), everything)
    assert accuracy != measures[measure](Embeddings(bank, test), everything)


def test_whitening_learns_from_all_training_embeddings():
    """A direction of large variance hides the classes. Six labelled images alone would not show how large it is."""
    random = np.random.default_rng(0)
    given = np.tile(np.arange(3, dtype=np.int32), 100)
    embeddings = np.concatenate([np.eye(3)[given], 30 * random.standard_normal((300, 1))], axis=1).astype(np.float32)
    split = LabelledEmbeddings(embeddings, given, ("a", "b", "c"))
    options = EvaluationConfig(num_neighbours=1, label_fraction=0.02, whiten=True)
    white = Embeddings(*whitened(split, split))
    expected = measure_knn(white, dataclasses.replace(options, whiten=False), device_mesh(1))
    assert measure_knn(Embeddings(split, split), options, device_mesh(1)) == expected


def test_whitening_learns_from_training_embeddings_without_labels():
    """As above, but the other images have no label at all."""
    random = np.random.default_rng(0)
    classes = np.tile(np.arange(3, dtype=np.int32), 100)
    embeddings = np.concatenate([np.eye(3)[classes], 30 * random.standard_normal((300, 1))], axis=1).astype(np.float32)
    bank = LabelledEmbeddings(embeddings, np.where(np.arange(300) < 6, classes, -1).astype(np.int32), ("a", "b", "c"))
    test = bank._replace(labels=classes)
    options = EvaluationConfig(num_neighbours=1, whiten=True)
    white = Embeddings(*whitened(bank, test))
    expected = measure_knn(white, dataclasses.replace(options, whiten=False), device_mesh(1))
    assert measure_knn(Embeddings(bank, test), options, device_mesh(1)) == expected
    assert examine(Embeddings(bank, test), options, 0).accuracy == pytest.approx(expected["top1"])


@pytest.fixture
def run(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "run")


def run_eval(*arguments):
    """`empssl eval` with these arguments and without a report."""
    evaluate(parse_evaluate_options([*map(str, arguments), "--no-report"]), lambda *_: pytest.fail("a report"))


ARGUMENTS = ["--label-fraction", "0.5", "--num-neighbours", "3", "--linear-epochs", "2"]


def test_eval_measures_the_embeddings_on_disk(run, monkeypatch, capsys):
    """The run has 8 training images of each digit. Its own results stay beside the new ones."""
    before = json.loads((run / "results.json").read_text())
    monkeypatch.setattr(embeddings, "embed_dataset", lambda *_: pytest.fail("images are embedded again"))
    run_eval("--workdir", run, *ARGUMENTS)
    after = json.loads((run / "results.json").read_text())
    assert after.pop("kNN, 50 % of labels")["label_fraction"] == 0.5
    assert after.pop("linear, 50 % of labels")["label_seed"] == 0
    del after["linear, best epoch on test, 50 % of labels"]
    assert after.keys() == before.keys()
    assert all(before[name].items() <= after[name].items() for name in before)  # eval adds step and options
    assert "\nkNN, 50 % of labels " in capsys.readouterr().out


def test_each_result_is_written_before_the_next_measure_begins(run, monkeypatch):
    """A command that is killed loses only what it is measuring."""

    def killed(*_):
        names = json.loads((run / "results.json").read_text())
        assert {"kNN, 50 % of labels", "linear, 50 % of labels"} <= set(names)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "measure_logistic", killed)
    with pytest.raises(KeyboardInterrupt):
        run_eval("--workdir", run, "--logistic", *ARGUMENTS)


def test_eval_measures_files_of_embeddings(run):
    run_eval("--embeddings", run / "embeddings", *ARGUMENTS, "--label-seed", "4")
    given = json.loads((run / "embeddings" / "results.json").read_text())
    name = "kNN, 50 % of labels (--label-seed 4)"
    assert given.pop("effective rank")["images"] == 10
    assert list(given) == [name, name.replace("kNN", "linear"), name.replace("kNN", "linear, best epoch on test")]
    with np.load(run / "embeddings" / "train.npz") as file:
        bank = LabelledEmbeddings(file["embeddings"], file["labels"], tuple("0123456789"))
    rows = chosen_rows(bank.labels, LabelConfig(0.5, 4))
    assert np.all(np.bincount(bank.labels[rows]) == 4)
    save_embeddings(
        run / "subset" / "train.npz", bank._replace(embeddings=bank.embeddings[rows], labels=bank.labels[rows])
    )
    shutil.copy(run / "embeddings" / "test.npz", run / "subset" / "test.npz")
    run_eval("--embeddings", run / "subset", *ARGUMENTS[2:])
    alone = json.loads((run / "subset" / "results.json").read_text())
    assert {key: alone["kNN"][key] for key in ("top1", "top5")}.items() <= given[name].items()


@pytest.mark.parametrize(
    ("change", "again"), [(["--valid-patches", "3"], True), (["--step", "1"], True), (["--whiten"], False)]
)
def test_images_are_embedded_again_only_if_the_embeddings_would_differ(run, change, again, capsys):
    run_eval("--workdir", run, "--linear-epochs", "0", *change)
    assert ("embedding train: 80 images" in capsys.readouterr().err) == again


def test_images_are_embedded_again_if_the_images_or_the_file_have_changed(run, capsys):
    path = run / "embeddings" / "train.npz"
    expected = dict(np.load(path))
    for change in (path.unlink, lambda: path.write_bytes(path.read_bytes()[:-500])):
        change()
        run_eval("--workdir", run, "--linear-epochs", "0")
        error = capsys.readouterr().err
        assert "embedding train: 80 images" in error
        assert "embedding test" not in error
        for name, array in np.load(path).items():
            np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("value", [0.0, 1.5, -0.1, float("nan"), True])
def test_a_fraction_out_of_range_is_refused(value):
    with pytest.raises(UserError, match=rf"^--label-fraction is {value}: give a number from 1e-09 to 1\.$"):
        EvaluationConfig(label_fraction=value)


def test_more_neighbours_than_labels_are_refused_before_the_images_are_embedded(run, capsys):
    with pytest.raises(UserError, match=r"^--num-neighbours is 20: that is more than the 10 labelled training images"):
        run_eval("--workdir", run, "--label-fraction", "0.1", "--valid-patches", "3")
    assert "embedding" not in capsys.readouterr().err
