"""Embeddings of mirrored images, which kNN and the classifiers learn from too."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import empssl_jax
from empssl_jax.config import DataConfig, EvaluationConfig
from empssl_jax.config.errors import UserError
from empssl_jax.data.datasets import load_split
from empssl_jax.evaluation import embeddings
from empssl_jax.evaluation.embedding_files import read_split, save_embeddings
from empssl_jax.evaluation.embeddings import Embeddings, LabelledEmbeddings
from empssl_jax.evaluation.evaluate import evaluate, measure_knn, measure_linear, measure_logistic
from empssl_jax.evaluation.few_labels import chosen_rows
from empssl_jax.evaluation.logistic import fit_classifier
from empssl_jax.evaluation.whitening import whiten, whitened
from empssl_jax.parse_options import parse_evaluate_options
from empssl_jax.report.findings import examine
from empssl_jax.runtime.devices import device_mesh

NAMES = ("a", "b", "c", "d")
OPTIONS = EvaluationConfig(num_neighbours=5, linear_epochs=5, mirror=True)


def blobs(size, seed):
    """Embeddings of four classes that overlap, and of their mirrored images."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, size).astype(np.int32)
    centres = np.random.default_rng(9).standard_normal((4, 8))
    plain, mirrored = (np.float32(centres[labels] + 1.5 * random.standard_normal((size, 8))) for _ in range(2))
    return LabelledEmbeddings(plain, labels, NAMES, mirrored=mirrored)


def joined(split, rows):
    """The images with these indices, and then their mirrored images, as images of their own."""
    both = np.concatenate([split.embeddings[rows], split.mirrored[rows]])
    return LabelledEmbeddings(both, np.tile(split.labels[rows], 2), NAMES)


@pytest.mark.parametrize("fraction", [1.0, 0.2])
@pytest.mark.parametrize("measure", [measure_knn, lambda both, options, mesh: measure_linear(both, options, 7, mesh)])
def test_neighbours_and_the_linear_classifier_learn_from_mirrored_images_as_from_others(measure, fraction):
    """Of the mirrored images, only those of chosen images have a label."""
    bank, test, mesh = blobs(300, 1), blobs(100, 2), device_mesh(1)
    options = dataclasses.replace(OPTIONS, label_fraction=fraction)
    plain = dataclasses.replace(OPTIONS, mirror=False)
    accuracy = measure(Embeddings(bank, test), options, mesh)
    assert accuracy == measure(Embeddings(joined(bank, chosen_rows(bank.labels, options)), test), plain, mesh)
    without = Embeddings(bank._replace(mirrored=None), test)
    ignored = dataclasses.replace(options, mirror=False)
    assert measure(Embeddings(bank, test), ignored, mesh) == measure(without, ignored, mesh) != accuracy


def test_logistic_regression_adds_the_scores_of_both_images():
    """Test images whose own embeddings show the wrong class are right if their mirrored images show theirs better."""
    bank, mesh = blobs(300, 1), device_mesh(1)
    centres = np.stack([bank.embeddings[bank.labels == label].mean(axis=0) for label in range(4)])
    labels = np.arange(4, dtype=np.int32)
    wrong, right = centres[(labels + 1) % 4], 3 * centres
    test = LabelledEmbeddings(wrong, labels, NAMES, mirrored=right)
    assert measure_logistic(Embeddings(bank, test), OPTIONS, mesh)["top1"] == 1
    assert measure_logistic(Embeddings(bank, test), dataclasses.replace(OPTIONS, mirror=False), mesh)["top1"] == 0


def test_the_mirror_image_of_a_held_out_image_is_held_out_too():
    """Random labels cannot be predicted, unless an embedding that equals the held-out one has been learned."""
    random = np.random.default_rng(0)
    vectors = np.float32(random.standard_normal((200, 400)))
    bank = LabelledEmbeddings(vectors, random.integers(0, 4, 200).astype(np.int32), NAMES, mirrored=vectors)
    for kernel in ("standardised", "whitened"):
        assert fit_classifier(bank, device_mesh(1), [kernel]).held_out_accuracy < 0.6


def test_mirrored_images_are_whitened_but_do_not_change_the_map():
    bank, test = blobs(50, 1), blobs(20, 2)
    of_bank, of_test = whitened(bank, test)
    expected, of_mirrored = whiten(bank.embeddings, bank.mirrored)
    np.testing.assert_allclose(of_bank.embeddings, expected, atol=1e-5)
    np.testing.assert_allclose(of_bank.mirrored, of_mirrored, atol=1e-5)
    np.testing.assert_allclose(of_test.mirrored, whiten(bank.embeddings, test.mirrored)[1], atol=1e-5)


def test_the_report_counts_the_votes_of_mirrored_images():
    both = Embeddings(blobs(300, 1), blobs(100, 2))
    for mirror in (False, True):
        options = dataclasses.replace(OPTIONS, mirror=mirror)
        expected = measure_knn(both, options, device_mesh(1))["top1"]
        assert examine(both, options, 0).accuracy == pytest.approx(expected)


def run_eval(*arguments):
    evaluate(parse_evaluate_options([*map(str, arguments), "--no-report"]), lambda *_: pytest.fail("a report"))


ARGUMENTS = ["--num-neighbours", "3", "--linear-epochs", "2"]


def test_eval_adds_the_mirrored_images_to_the_embeddings_on_disk(tiny_run, tmp_path, monkeypatch):
    """The flipped images are embedded as other images would be; the images themselves are not embedded again."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    before, embed_dataset, embedded = read_split(run / "embeddings" / "train.npz"), embeddings.embed_dataset, []

    def record(*arguments):
        embedded.append(arguments[-1])
        return embed_dataset(*arguments)

    monkeypatch.setattr(embeddings, "embed_dataset", record)
    run_eval("--workdir", run, "--mirror", *ARGUMENTS)
    run_eval("--workdir", run, *ARGUMENTS)
    run_eval("--workdir", run, "--mirror", *ARGUMENTS)
    assert embedded == ["mirrored train"]  # only logistic regression takes the mirrored test images
    for options in (["--logistic"], [], ["--logistic"]):
        run_eval("--workdir", run, "--mirror", *options, *ARGUMENTS)
    assert embedded == ["mirrored train", "mirrored test"]
    after = read_split(run / "embeddings" / "train.npz")
    np.testing.assert_array_equal(after.embeddings, before.embeddings)
    data = DataConfig(dataset="digits", images_per_class=8, test_images_per_class=1)
    flipped = np.ascontiguousarray(load_split(data, "train", None).images[:, :, ::-1])
    np.testing.assert_allclose(after.mirrored, empssl_jax.load(run).embed(flipped), rtol=1e-4, atol=1e-6)
    results = json.loads((run / "results.json").read_text())
    assert results["kNN"]["embeddings"] == "2 random patches, hidden, also mirrored"


def test_embeddings_of_images_are_kept_if_the_command_is_killed_before_those_of_mirrored_images(
    tiny_run, tmp_path, monkeypatch
):
    run, embed_dataset, embedded = shutil.copytree(tiny_run, tmp_path / "run"), embeddings.embed_dataset, []

    def killed(*arguments):
        embedded.append(arguments[-1])
        if len(embedded) == 2:
            raise KeyboardInterrupt
        return embed_dataset(*arguments)

    monkeypatch.setattr(embeddings, "embed_dataset", killed)
    options = ["--workdir", run, "--mirror", "--valid-patches", "3", *ARGUMENTS]
    with pytest.raises(KeyboardInterrupt):
        run_eval(*options)
    run_eval(*options)
    assert embedded == ["train", "mirrored train", "mirrored train", "test"]


def test_an_interruption_leaves_no_embeddings_of_two_checkpoints(tiny_run, tmp_path, monkeypatch):
    run, embed_dataset = shutil.copytree(tiny_run, tmp_path / "run"), embeddings.embed_dataset

    def killed(*arguments):
        if arguments[-1] == "test":
            raise KeyboardInterrupt
        return embed_dataset(*arguments)

    monkeypatch.setattr(embeddings, "embed_dataset", killed)
    with pytest.raises(KeyboardInterrupt):
        run_eval("--workdir", run, "--step", "1", *ARGUMENTS)
    assert [path.name for path in (run / "embeddings").iterdir()] == ["train.npz"]


def test_files_of_embeddings_may_contain_those_of_mirrored_images(tmp_path):
    splits = {"train": blobs(60, 1), "test": blobs(20, 2)}
    for name, split in splits.items():
        save_embeddings(tmp_path / f"{name}.npz", split)
    run_eval("--embeddings", tmp_path, "--mirror", *ARGUMENTS)
    results = json.loads((tmp_path / "results.json").read_text())
    options = dataclasses.replace(OPTIONS, num_neighbours=3)
    assert measure_knn(Embeddings(*splits.values()), options, device_mesh()).items() <= results["kNN"].items()
    save_embeddings(tmp_path / "test.npz", splits["test"]._replace(mirrored=None))
    run_eval("--embeddings", tmp_path, *ARGUMENTS)
    run_eval("--embeddings", tmp_path, "--mirror", *ARGUMENTS)
    with pytest.raises(UserError, match=r"^--mirror is True: .*test.npz has no array named mirrored, so leave it out"):
        run_eval("--embeddings", tmp_path, "--mirror", "--logistic", *ARGUMENTS)


@pytest.mark.parametrize(
    ("mirrored", "message"),
    [
        (np.eye(3)[:2], r"embeddings of shape \(3, 3\) and mirrored of shape \(2, 3\)"),
        (np.full((3, 3), np.nan), "contains values that are not finite"),
        (np.arange(3), r"mirrored has shape \(3,\), type int64 .* instead of 2 dimensions of real numbers"),
    ],
)
def test_mirrored_embeddings_that_do_not_fit_are_refused(tmp_path, mirrored, message):
    np.savez(tmp_path / "train.npz", embeddings=np.eye(3), labels=np.arange(3), mirrored=mirrored)
    with pytest.raises(UserError, match=message):
        read_split(tmp_path / "train.npz")
