"""The encoder that comes with the package loads by name, embeds well, and becomes a run."""

import os

import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
from sklearn.neighbors import KNeighborsClassifier

import empssl_jax
from empssl_jax.command_line import COMMANDS
from empssl_jax.config import DataConfig
from empssl_jax.config.config_files import read_config_file
from empssl_jax.config.errors import UserError
from empssl_jax.config.pretrained import FOLDER, pretrained_file
from empssl_jax.data.datasets import load_split
from empssl_jax.inference.torch_names import to_torch

NAME = "cifar10-small"
FILE = FOLDER / f"{NAME}.safetensors"
DIM = 32 + 64 + 128 + 256  # of all four stages
needs_cifar10 = pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="TFDS_DATA_DIR is not set")


def run(command, *arguments):
    COMMANDS[command].run(list(map(str, arguments)), f"empssl {command}")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)


def test_it_has_six_megabytes_at_most_and_a_model_card():
    assert FILE.stat().st_size <= 6_000_000
    assert FILE.with_suffix(".md").read_text().startswith(f"# {NAME}\n")


def test_it_embeds_as_its_config_says(images):
    encoder = empssl_jax.load(NAME)
    assert encoder.config.evaluation.embedding == read_config_file("cifar10_cpu").evaluation.embedding
    assert (encoder.image_size, encoder.config.model.width, encoder.config.patches.patch_size) == (32, 32, 16)
    both = encoder.embed(images)
    assert both.shape == (2, 2 * 4 * DIM)
    # Each view's embedding alone is a part of both side by side.
    for view in ({"valid_crops": "grid"}, {"valid_crops": "whole", "valid_patches": 1}):
        alone = empssl_jax.load(NAME, **view).embed(images)
        parts = (both[:, : 4 * DIM], both[:, 4 * DIM :])
        assert min(np.max(np.abs(part - alone)) for part in parts) < 1e-4


@needs_cifar10
def test_nearest_neighbours_of_few_labelled_images_are_of_the_right_class():
    """scikit-learn's kNN (k = 20) with 100 labelled images of each class classifies three of five test images.

    Untrained networks classify less than a third.
    """
    data = DataConfig(images_per_class=100, test_images_per_class=50)
    encoder = empssl_jax.load(NAME, valid_crops="whole", valid_patches=1)
    train, test = (load_split(data, split, None) for split in ("train", "test"))
    classifier = KNeighborsClassifier(20, metric="cosine").fit(encoder.embed(train.images), train.labels)
    assert classifier.score(encoder.embed(test.images), test.labels) > 0.6


def test_embed_takes_its_name(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(images):
        PIL.Image.fromarray(image).save(f"photos/{number}.png")
    run("embed", "--workdir", NAME, "--images", "photos", "--valid-crops", "whole", "--valid-patches", 1)
    with np.load("embeddings.npz") as arrays:
        expected = empssl_jax.load(NAME, valid_crops="whole", valid_patches=1).embed(images)
        np.testing.assert_array_equal(arrays["embeddings"], expected)


def test_import_makes_a_run_with_new_heads(tmp_path):
    run("import", NAME, "--fresh-heads", "--workdir", tmp_path / "run")
    encoder = empssl_jax.load(tmp_path / "run")
    arrays = to_torch(encoder.state, encoder.config.model, 0)
    for name, array in safetensors.numpy.load_file(FILE).items():
        np.testing.assert_array_equal(arrays[f"backbone.{name}"], array.astype(np.float32), err_msg=name)
    loaded = to_torch(empssl_jax.load(NAME).state, encoder.config.model, 0)
    assert loaded.keys() == arrays.keys()
    for name, array in loaded.items():
        if name.startswith("backbone."):
            np.testing.assert_array_equal(array, arrays[name], err_msg=name)
    assert np.std(arrays["pre_feature.0.weight"]) > 0, "those of a run can be trained"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 3}, r"--step is 3: cifar10-small has one checkpoint, so leave it out"),
        (
            {"embedded_layer": "hidden"},
            r"--embedded-layer is 'hidden': cifar10-small is a ResNet without a hidden layer",
        ),
        ({"cells": 3}, r"--cells is 3: "),
    ],
)
def test_load_refuses_what_it_lacks(options, message):
    with pytest.raises(UserError, match=message):
        empssl_jax.load(NAME, **options)


@pytest.mark.parametrize("command", ["eval", "export", "finetune", "report", "compare"])
def test_commands_that_need_a_run_say_how_to_make_one(command):
    with pytest.raises(
        UserError, match="not a run: `empssl import cifar10-small --fresh-heads --workdir RUN` makes one"
    ):
        run(command, *(["--workdir"] * (command == "eval")), NAME)


def test_a_comparison_with_a_run_says_how_to_make_one(tiny_run):
    with pytest.raises(UserError, match="RUN cifar10-small is an encoder that comes with the package"):
        run("compare", str(tiny_run), NAME)


def test_a_folder_of_the_same_name_is_a_run(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pretrained_file(NAME) == FILE
    assert pretrained_file(f"./{NAME}/x") is None
    os.symlink(tiny_run, NAME)
    assert pretrained_file(NAME) is None
    assert empssl_jax.load(NAME).config.model.width == 4
