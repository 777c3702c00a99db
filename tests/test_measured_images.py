"""A run is measured on its own images, wherever they are, and on other data sets, whose results are kept apart."""

import dataclasses
import errno
import json
import os
import shutil

import numpy as np
import PIL.Image
import pytest

import empssl_jax
from empssl_jax import training
from empssl_jax.config import Config, DataConfig, RunConfig
from empssl_jax.config.command_options import MeasuredData, ReportOptions
from empssl_jax.config.errors import UserError
from empssl_jax.data.datasets import load_datasets
from empssl_jax.data.folder_images import folder_fingerprints
from empssl_jax.evaluation.evaluate import evaluate
from empssl_jax.evaluation.measured_images import measured_images
from empssl_jax.parse_options import parse_evaluate_options
from empssl_jax.report.write_report import report_run
from empssl_jax.run_folder.results import load_results
from empssl_jax.run_folder.saved_config import SavedImages, load_config, load_saved_images, save_config, save_images


def write_pictures(root):
    """Noise in uncompressed files of one size: 12 to learn from and copies of 6 to test on, one in the wrong class."""
    random = np.random.RandomState(0)
    for number in range(12):
        pixels = PIL.Image.fromarray(random.randint(0, 256, (32, 32, 3)).astype(np.uint8))
        paths = [root / "train" / "ab"[number % 2] / f"{number:02}.bmp"]
        if number < 6:
            paths.append(root / "test" / "ab"[(number % 2) ^ (number == 5)] / f"copy {number:02}.bmp")
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels.save(path)


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / "pictures"
    write_pictures(root)
    return root


@pytest.fixture
def run(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "run")


def measure(run, *options):
    """Evaluates like the command; returns the results and what the report was called with."""
    reported = []
    arguments = ["--workdir", str(run), "--cache-dir", str(run.parent / "cache"), "--num-neighbours", "1", *options]
    evaluate(parse_evaluate_options(arguments), lambda *about: reported.append(about))
    return load_results(run), reported


def test_another_data_set_is_embedded_as_from_python_and_kept_apart(run, pictures):
    own = {path: path.read_bytes() for path in (run / "config.json", *(run / "embeddings").iterdir())}
    before = load_results(run)
    plain = {"valid_crops": "grid", "valid_patches": 4}  # without random numbers, copies have equal embeddings
    options = ["--valid-crops", "grid", "--valid-patches", "4", "--report"]
    results, reported = measure(run, "--dataset", f"folder:{pictures}", *options)
    (folder,) = (path for path in (run / "embeddings").iterdir() if path.is_dir())
    encoder, stored = empssl_jax.load(run, **plain), {}
    for split in ("train", "test"):
        with np.load(folder / f"{split}.npz") as arrays:
            stored[split] = dict(arrays)
        files = [pictures / split / name for name in stored[split]["names"]]
        assert files == sorted((pictures / split).rglob("*.bmp"))
        np.testing.assert_array_equal(
            stored[split]["embeddings"], encoder.embed([PIL.Image.open(file) for file in files])
        )
        assert ["ab"[label] for label in stored[split]["labels"]] == [file.parent.name for file in files]
    # The nearest image of a copy is its original. Five of the six have its class; one neighbour has one vote.
    name = f"folder:{pictures}"
    accuracy = {
        "top1": pytest.approx(5 / 6),
        "top5": pytest.approx(5 / 6),
        "embeddings": "4 grid patches, hidden",
        "dataset": name,
        "step": 2,
        "options": {"num_neighbours": 1, "temperature": 0.07},
    }
    values = np.linalg.svd(np.float64(stored["test"]["embeddings"]), compute_uv=False)
    shares = values / values.sum()
    rank = {
        "rank": pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=1e-3),
        "images": 6,
        "dimensions": stored["test"]["embeddings"].shape[1],
        "embeddings": "4 grid patches, hidden",
        "dataset": name,
        "step": 2,
        "options": {},
    }
    assert results == before | {f"{name}: kNN": accuracy, f"{name}: effective rank": rank}
    assert {path: path.read_bytes() for path in own} == own
    ((_, config, datasets),) = reported  # the report stays one about the run's own data set
    assert config.data.dataset == "digits"
    assert len(datasets.train.images) == 80


def test_other_options_of_the_run_s_data_set_do_not_replace_its_results(run):
    before = load_results(run)
    results, _ = measure(run, "--test-images-per-class", "2")
    name = "digits, --images-per-class 8, --test-images-per-class 2"
    assert set(results) - set(before) == {f"{name}: kNN", f"{name}: effective rank"}
    assert {name: value for name, value in results.items() if name in before} == before
    with np.load(run / "embeddings" / "test.npz") as arrays:
        assert len(arrays["labels"]) == 10


def test_images_that_cannot_be_read_do_not_blame_the_run_s_folder(run, monkeypatch):
    def fail(config):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("empssl_jax.evaluation.evaluate.load_datasets", fail)
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error$"):
        measure(run)


def test_a_run_records_the_number_of_its_training_images(run):
    assert load_saved_images(run) == SavedImages(32, {}, num_train=80)


def images_of(run, trained, **options):
    return measured_images(MeasuredData(**options), trained, run)


def test_which_data_set_is_meant_and_what_it_is_called(tmp_path):
    save_images(tmp_path, SavedImages(48, {}))
    trained = DataConfig(dataset="stl10", train_split="unlabelled", images_per_class=None)
    assert images_of(tmp_path, trained) == (trained, None)
    assert images_of(tmp_path, trained, dataset="stl10", image_size=48, strict_images=True).name is None
    assert images_of(tmp_path, trained, dataset="cifar100") == (DataConfig("cifar100", image_size=48), "cifar100")
    assert images_of(tmp_path, trained, dataset="cifar100", image_size=48).name == "cifar100"
    other = images_of(tmp_path, trained, dataset="eurosat/rgb", train_split="train[:80%]", test_split="train[80%:]")
    assert other.name == "eurosat/rgb, --train-split train[:80%], --test-split train[80%:]"
    assert images_of(tmp_path, trained, train_split="train").name == "stl10"
    assert images_of(tmp_path, trained, image_size=96).name == "stl10, --train-split unlabelled, --image-size 96"
    with pytest.raises(UserError, match=r"^--image-size is 0: give a whole number from 1"):
        images_of(tmp_path, trained, dataset="cifar100", image_size=0)


def test_folders_of_embeddings_differ_as_the_data_sets_do(tmp_path):
    save_images(tmp_path, SavedImages(32, {}))
    names = ["cifar100", "a/b", "a-b", "a b", "folder:/" + "x" * 200, "folder:/" + "y" + "x" * 200]
    folders = [images_of(tmp_path, DataConfig(), dataset=name).embeddings_folder(tmp_path) for name in names]
    assert len({*folders}) == len(names)
    assert folders[0] == tmp_path / "embeddings" / "cifar100"
    assert {folder.parent for folder in folders} == {tmp_path / "embeddings"}
    assert images_of(tmp_path, DataConfig()).embeddings_folder(tmp_path) == tmp_path / "embeddings"


@pytest.fixture
def trained_on(pictures, tmp_path):
    """The folder and config of a run on the pictures, as training saves it; it has no checkpoint."""
    config = Config(data=DataConfig(dataset=f"folder:{pictures}", images_per_class=5))
    (tmp_path / "r").mkdir()
    save_config(tmp_path / "r", config)
    save_images(tmp_path / "r", SavedImages(32, folder_fingerprints(config.data)))
    return tmp_path / "r", config


def moved(config, root):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, dataset=f"folder:{root}"))


def change_a_pixel(root, split):
    path = root / split / "a" / ("copy " * (split == "test") + "00.bmp")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_moved_folder_is_recognised_by_its_images(trained_on, pictures, tmp_path, monkeypatch):
    run, config = trained_on
    there = pictures.rename(tmp_path / "elsewhere")
    assert images_of(run, config.data, dataset=f"folder:{there}") == (moved(config, there).data, None)
    assert training._differences(run, moved(config, there)) == []
    monkeypatch.chdir(tmp_path)
    assert images_of(run, config.data, dataset="folder:elsewhere") == (moved(config, there).data, None)
    change_a_pixel(there, "test")  # which training does not see
    assert training._differences(run, moved(config, there)) == []
    assert images_of(run, config.data, dataset=f"folder:{there}").name == f"folder:{there}"
    change_a_pixel(there, "train")
    change = f"--dataset folder:{there} (was folder:{pictures})"
    assert training._differences(run, moved(config, there)) == [change]
    with pytest.raises(UserError, match=r"^--dataset '.*' holds other images than .* has: give the run's own"):
        report_run(ReportOptions(run=str(run), dataset=f"folder:{there}"))


def test_changed_images_at_the_same_place_are_another_run(trained_on, pictures):
    run, config = trained_on
    assert training._differences(run, config) == []
    change_a_pixel(pictures, "train")
    assert training._differences(run, config) == [f"the training images in {pictures} have changed"]


def test_another_number_of_training_images_is_another_run(run, monkeypatch):
    """Data sets other than folders have no fingerprint, but epochs of 79 images are not those of 80."""
    config = load_config(run)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, workdir=str(run)))
    all_images = load_datasets(config)
    fewer = all_images._replace(train=all_images.train.take(np.arange(79)))
    monkeypatch.setattr(training, "load_datasets", lambda config: fewer)
    monkeypatch.setattr(training, "_complete_run", lambda *args: None)
    with pytest.raises(UserError, match=r" holds another run: 79 training images \(was 80\); give the former values"):
        training.train(config)
    save_images(run, load_saved_images(run)._replace(num_train=None))  # as of imported weights
    training.train(config)


def test_runs_that_recorded_no_fingerprint_are_compared_by_path(trained_on, pictures, tmp_path):
    run, config = trained_on
    (run / "images.json").write_text(json.dumps({"size": 32}))
    change_a_pixel(pictures, "train")
    assert training._differences(run, config) == []
    there = pictures.rename(tmp_path / "elsewhere")
    assert training._differences(run, moved(config, there)) == [f"--dataset folder:{there} (was folder:{pictures})"]


def test_a_relative_folder_is_saved_with_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert DataConfig(dataset="folder:a/b").with_absolute_folder().dataset == f"folder:{tmp_path}/a/b"
    for name in ("digits", "folder:", "folder:/a"):
        assert DataConfig(dataset=name).with_absolute_folder().dataset == name


def test_relative_folders_of_data_are_saved_with_their_place(run, tmp_path, monkeypatch):
    """A later command finds them from any folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "_fit", lambda *args: None)
    config = load_config(run)
    given = dataclasses.replace(config.run, workdir="run", data_dir="tfds", cache_dir="../cache")
    off = dataclasses.replace(config.evaluation, valid_patches=0)
    training.train(dataclasses.replace(config, run=given, evaluation=off))
    saved = parse_evaluate_options(["--workdir", str(run)])
    assert (saved.data_dir, saved.cache_dir) == (f"{tmp_path}/tfds", f"{tmp_path}/../cache")


def test_addresses_and_defaults_of_folders_stay():
    for folders in (RunConfig(), RunConfig(data_dir="gs://bucket/tfds", cache_dir="/a")):
        assert folders.with_absolute_folders() == folders
