"""Encoders in Python compute the embeddings of eval.py, accept every kind of image, and leave the run unchanged."""

import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import empssl_jax
from empssl_jax.config.command_options import EvaluateOptions
from empssl_jax.config.errors import DivergenceError, UserError
from empssl_jax.data.datasets import load_split
from empssl_jax.evaluation.embedding_files import read_split
from empssl_jax.evaluation.embeddings import make_embed
from empssl_jax.evaluation.evaluate import evaluate
from empssl_jax.inference import image_encoder as encoder
from empssl_jax.run_folder.saved_config import load_config
from empssl_jax.run_folder.workdir import locked
from empssl_jax.runtime.devices import device_mesh


@pytest.fixture(scope="module")
def loaded(tiny_run):
    return empssl_jax.load(tiny_run)


@pytest.fixture(scope="module")
def digits(tiny_run):
    return load_split(load_config(tiny_run).data, "test", None).images


def test_embeddings_are_bit_identical_to_those_of_eval(tiny_run, loaded):
    config = load_config(tiny_run)
    evaluate(EvaluateOptions(str(tiny_run), evaluation=config.evaluation), write_report=lambda *_: None)
    for split, size in (("train", 80), ("test", 10)):
        images = load_split(config.data, split, None).images
        expected = read_split(tiny_run / "embeddings" / f"{split}.npz").embeddings
        assert len(images) == len(expected) == size
        np.testing.assert_array_equal(loaded.embed(images), expected)
        np.testing.assert_array_equal(loaded.embed(list(images)), expected)


def test_an_image_s_index_decides_its_patches(loaded, digits):
    together, alone = loaded.embed(digits), loaded.embed(digits[7:8], indices=np.array([7]))
    np.testing.assert_allclose(alone[0], together[7], rtol=1e-4, atol=1e-5)
    assert np.max(np.abs(loaded.embed(digits[7:8])[0] - together[7])) > 1e-3


def test_embeddings_that_are_not_finite_are_refused(loaded, digits):
    broken = loaded.state._replace(params=jax.tree.map(lambda x: x * jnp.nan, loaded.state.params))
    with pytest.raises(DivergenceError, match="embeddings are not all finite: train again"):
        encoder.ImageEncoder(loaded.config, broken, loaded.step, loaded.image_size).embed(digits)


def test_the_number_of_patches(loaded, digits):
    # Patch p of an image does not depend on the number of patches.
    one, two, three = (loaded.embed(digits, patches=patches) for patches in (1, 2, 3))
    np.testing.assert_array_equal(two, loaded.embed(digits))
    assert np.max(np.abs(3 * three - 2 * two - one)) > 1e-3
    assert np.min(3 * three - 2 * two) > -1e-4  # the third patch's embedding, an output of ReLU


def test_options_of_the_evaluation_replace_the_run_s(tiny_run, digits):
    grid = empssl_jax.load(tiny_run, valid_crops="grid", valid_patches=4, cells=2)
    by_cell = grid.embed(digits)
    mean = empssl_jax.load(tiny_run, valid_crops="grid", valid_patches=4).embed(digits)
    np.testing.assert_allclose(by_cell.reshape(10, 4, 32).mean(axis=1), mean, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="--cells is 2: random crops belong to no cell"):
        empssl_jax.load(tiny_run, cells=2)


@pytest.mark.parametrize("workdir", ["nowhere", "cifar10-small"])
def test_options_that_change_no_embedding_are_refused(workdir):
    names = "valid_patches, valid_crops, embedded_layer, cells, embedding_batch_size"
    for name in ("valid_patch", "num_neighbours", "workdirs", "valid-crops"):
        with pytest.raises(UserError, match=f"^load has no option {name}: give some of {names}.$"):
            empssl_jax.load(workdir, **{name: 1})
    with pytest.raises(UserError, match=r"^load has no option whiten: .* empssl_jax\.evaluation\.whitening\.whiten\.$"):
        empssl_jax.load(workdir, whiten=True)


def test_progress_counts_every_image_once(loaded, digits):
    done = []
    loaded.embed(np.concatenate([digits] * 4), progress=done.append)
    assert done == [32, 8]


def test_few_sizes_are_compiled(loaded, digits):
    five = dataclasses.replace(loaded.config.evaluation, valid_patches=5)
    embed = make_embed(dataclasses.replace(loaded.config, evaluation=five), device_mesh())
    for size in (9, 10, 16):
        loaded.embed(np.concatenate([digits] * 2)[:size], patches=5)
    assert embed.func._cache_size() == 1


def test_an_empty_list_gives_no_embeddings(loaded):
    assert loaded.embed([]).shape == (0, 32)


PIXELS = np.random.RandomState(0).randint(0, 256, (32, 48, 3)).astype(np.uint8)
RED = np.zeros((64, 100, 3), np.uint8) + np.uint8([200, 10, 30])


def test_the_middle_of_the_shorter_side_is_kept():
    np.testing.assert_array_equal(encoder.to_square(PIXELS, 32), PIXELS[:, 8:40])
    np.testing.assert_array_equal(encoder.to_square(PIXELS.swapaxes(0, 1), 32), PIXELS.swapaxes(0, 1)[8:40])
    np.testing.assert_array_equal(encoder.to_square(RED, 32), RED[:32, :32])
    # An image of 64 rows and 100 columns turns from black to white in the middle, and so does its resized crop.
    step = np.repeat(np.uint8(255 * (np.arange(100) >= 50))[None], 64, axis=0)
    shrunk = encoder.to_square(step, 16)
    assert shrunk[:, :7].max() < 10
    assert shrunk[:, 9:].min() > 245


@pytest.mark.parametrize(
    "image",
    [
        np.full((32, 32), 7, np.uint8),
        np.full((32, 32, 1), 7, np.uint8),
        np.full((32, 32, 3), 7, np.uint8),
        np.dstack([np.full((32, 32, 3), 7, np.uint8), np.zeros((32, 32), np.uint8)]),
        PIL.Image.new("RGB", (32, 32), (7, 7, 7)),
        PIL.Image.new("L", (40, 36), 7),
        PIL.Image.new("RGBA", (32, 32), (7, 7, 7, 0)),
        PIL.Image.new("RGB", (32, 32), (7, 7, 7)).convert("P", palette=PIL.Image.Palette.ADAPTIVE),
    ],
)
def test_modes_are_converted(image):
    np.testing.assert_array_equal(encoder.to_square(image, 32), np.full((32, 32, 3), 7, np.uint8))


def half_a_file() -> PIL.Image.Image:
    file = io.BytesIO()
    PIL.Image.fromarray(PIXELS).save(file, "png")
    return PIL.Image.open(io.BytesIO(file.getvalue()[:1000]))


TRUNCATED = half_a_file()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 32, 32, 3)), "Image 0 has type float64 .*: give uint8 arrays"),
        ([np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32, 7), np.uint8)], "Image 1 has type uint8"),
        ([np.zeros(32, np.uint8)], "Image 0 has type uint8"),
        (
            [np.zeros((0, 0, 3), np.uint8)],
            r"Image 0 has type uint8 \(0, 0, 3\) \(it has no pixels\): give uint8 arrays",
        ),
        (np.zeros((2, 5, 0, 3), np.uint8), "Image 0 has type uint8 .* no pixels"),
        (PIL.Image.new("L", (0, 0)), "Image 0 has type Image .* no pixels"),
        (["cat.jpg"], "Image 0 has type str"),
        ("cat.jpg", r"^images is str \(a name is not an image\): give a list of uint8 arrays"),
        (Path("cat.jpg"), r"^images is PosixPath \(.*not iterable\): give a list"),
        (None, r"^images is NoneType \(.*not iterable\): give a list"),
        (np.uint8(3), r"^images is uint8 \(it has no rows and columns\): give a list"),
        (
            np.zeros((3, 32, 32), np.uint8),
            r"^images has shape \(3, 32, 32\), which .*channels first: give list\(images\)",
        ),
        (TRUNCATED, r"Image 0 has type PngImageFile \(.*truncated.*\): give"),
        ([PIL.Image.new("F", (8, 8))], "instead of 8 or 16 bits"),
    ],
)
def test_what_is_not_an_image_is_refused(loaded, images, message):
    with pytest.raises(UserError, match=message):
        loaded.embed(images)


def test_one_image_gives_one_embedding(loaded, digits):
    expected = loaded.embed(digits[:1])
    gray = digits[0][..., 0]
    np.testing.assert_array_equal(np.repeat(gray[..., None], 3, axis=2), digits[0])
    for image in (digits[0], PIL.Image.fromarray(digits[0]), jnp.asarray(digits[0]), gray, gray[..., None]):
        np.testing.assert_array_equal(loaded.embed(image), expected)


def test_every_sequence_of_images_is_accepted(loaded, digits):
    expected = loaded.embed(digits)
    for images in (iter(digits), tuple(digits), map(PIL.Image.fromarray, digits), jnp.asarray(digits), digits[..., 0]):
        np.testing.assert_array_equal(loaded.embed(images), expected)
    np.testing.assert_array_equal(loaded.embed(list(digits[:4, ..., 0])), loaded.embed(digits[:4]))
    assert loaded.embed(iter(())).shape == (0, 32)


@pytest.mark.parametrize("indices", [[2**31], [2**40], [2**70], [-1], [0.5], [True], [[1]], [[1], [1, 2]], 3, ["a"]])
def test_indices_that_are_not_whole_numbers_of_32_bits_are_refused(loaded, digits, indices):
    with pytest.raises(UserError, match=r"^indices is .*: give a list of whole numbers from 0 to 2147483647\.$"):
        loaded.embed(digits[:1], indices=indices)


def test_wrong_numbers_are_refused(loaded, digits):
    with pytest.raises(UserError, match="--valid-patches is 0"):
        loaded.embed(digits, patches=0)
    with pytest.raises(UserError, match="indices has length 1 for 10 images: give one for each"):
        loaded.embed(digits, indices=np.array([1]))


def test_loading_leaves_the_folder_as_it_is_while_another_process_has_it(tiny_run):
    def content():
        return {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*") if path.name != "lock"}

    before = content()
    with locked(tiny_run):
        assert empssl_jax.load(tiny_run, step=1).step == 1
    assert content() == before


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "has no config.json"),
        (lambda folder: folder.joinpath("images.json").write_text('{"size": "x"}'), "images.json cannot be read"),
    ],
)
def test_folders_that_are_not_runs_are_refused(tiny_run, tmp_path, prepare, message):
    if prepare(tmp_path) is not None:
        (tmp_path / "config.json").write_bytes((tiny_run / "config.json").read_bytes())
        (tmp_path / "checkpoints").symlink_to(tiny_run / "checkpoints")
    with pytest.raises(UserError, match=message):
        empssl_jax.load(tmp_path)


def test_a_run_without_checkpoints_is_refused(tiny_run, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_run / "config.json").read_bytes())
    with pytest.raises(UserError, match="holds no checkpoint"):
        empssl_jax.load(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_importing_the_package_imports_no_jax_and_sets_its_variables_first():
    code = """
import sys, os, empssl_jax
assert not {"jax", "numpy"} & set(sys.modules)
assert not hasattr(empssl_jax, "nothing")
load = empssl_jax.load
assert "jax" in sys.modules and load.__module__ == "empssl_jax.inference.image_encoder"
print(os.environ["XLA_FLAGS"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    printed = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert printed.strip() == "--xla_cpu_experimental_ynn_fusion_type="
