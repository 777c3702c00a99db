"""Compares crops of any aspect ratio with PIL, and their distribution with that of torchvision."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from empssl_jax.method import crops, patches

KEY = jax.random.key(0)
FILTERS = {"bilinear": PIL.Image.Resampling.BILINEAR, "bicubic": PIL.Image.Resampling.BICUBIC}
BOXES = [(0, 0, 64, 64), (5, 9, 28, 37), (36, 0, 28, 37), (31, 17, 33, 25), (63, 40, 1, 24), (10, 20, 44, 3)]


@pytest.fixture(scope="module")
def mosaic(golden):
    """The four real images, tiled into one image of 64x64 pixels."""
    first, second, third, fourth = golden("augmentations")["images"]
    return np.vstack([np.hstack([first, second]), np.hstack([third, fourth])])


def planes(image):
    return jnp.moveaxis(jnp.asarray(image, jnp.float32), -1, 0)


resize = jax.jit(crops.resize_crop, static_argnames=("size", "interpolation"))


def resized(image, box, size, interpolation):
    top, left, *sides = box
    ours = resize(planes(image), top, left, jnp.array(sides), size=size, interpolation=interpolation)
    return np.moveaxis(np.asarray(ours), 0, -1)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size", [8, 32, 96])
@pytest.mark.parametrize("box", BOXES)
def test_crops_are_resized_as_in_pil(mosaic, box, size, interpolation):
    """PIL rounds to integers after each axis. Two calls fix the order, which newer versions choose themselves."""
    top, left, height, width = box
    image = PIL.Image.fromarray(mosaic).crop((left, top, left + width, top + height))
    for shape in ((size, height), (size, size)):
        image = image.resize(shape, FILTERS[interpolation])
    expected = np.asarray(image, np.float64)
    difference = np.abs(resized(mosaic, box, size, interpolation) - expected)
    assert difference.max() <= 1.5
    assert difference.mean() <= 0.6
    assert expected.std() > 10


def test_pil_s_box_which_sees_pixels_beyond_the_crop_agrees_inside(mosaic):
    top, left, height, width = 5, 9, 28, 37
    box = (left, top, left + width, top + height)
    expected = np.asarray(PIL.Image.fromarray(mosaic).resize((64, 64), PIL.Image.Resampling.BICUBIC, box=box))
    ours = resized(mosaic, (top, left, height, width), 64, "bicubic")
    inside = (slice(8, -8), slice(8, -8))
    assert np.abs(ours[inside] - expected[inside]).max() <= 2.0


def test_golden_crops(golden):
    numbers = golden("augmentations")
    cases = [key for key in numbers if key.startswith("crop_") and "/" not in key]
    assert cases
    for case in cases:
        top, left, side = (int(numbers[f"{case}/{name}"]) for name in ("top", "left", "size"))
        for image, expected in zip(numbers["images"], numbers[case], strict=True):
            ours = crops.square_crop(planes(image), top, left, side, len(expected))
            assert np.abs(np.moveaxis(np.asarray(ours), 0, -1) - np.float64(expected)).max() <= 1.5


def test_square_crops_that_keep_their_size_are_slices(mosaic):
    for top, left in ((0, 0), (3, 48), (48, 5)):
        crop = np.asarray(crops.square_crop(planes(mosaic), top, left, 16, 16))
        np.testing.assert_array_equal(np.moveaxis(crop, 0, -1), mosaic[top : top + 16, left : left + 16])


def test_square_bilinear_crops_are_those_of_the_plain_path(mosaic):
    for top, left in ((0, 0), (7, 32), (32, 19)):
        plain = crops.square_crop(planes(mosaic), top, left, 32, 20)
        ours = resized(mosaic, (top, left, 32, 32), 20, "bilinear")
        np.testing.assert_allclose(ours, np.moveaxis(np.asarray(plain), 0, -1), atol=1e-3)


@pytest.fixture(scope="module")
def draws():
    """Height and width of 20,000 crops that cover a quarter of an image."""
    draw = functools.partial(crops.draw_sides, image_side=100_000, area=0.25, aspect=4 / 3)
    return np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(KEY, 20_000)))


def test_crops_have_their_area_and_log_uniform_ratios(draws):
    height, width = draws.T
    np.testing.assert_allclose(1.0 * height * width, 2.5e9, rtol=1e-4)
    ratios, limit = np.log(width / height), math.log(4 / 3)
    assert -limit - 0.0001 < ratios.min() < -0.99 * limit
    assert 0.99 * limit < ratios.max() < limit + 0.0001
    counts, _ = np.histogram(ratios, 20, (-limit - 0.0001, limit + 0.0001))
    assert np.sum((counts - 1000) ** 2 / 1000) < 19 + 5 * math.sqrt(38)


@pytest.mark.parametrize(("area", "aspect"), [(1.0, 4 / 3), (0.9, 4 / 3), (0.25, 100.0), (1e-9, 100.0), (0.5, 1.0)])
def test_crops_fit_into_their_image(area, aspect):
    draw = functools.partial(crops.draw_sides, image_side=33, area=area, aspect=aspect)
    sides = np.asarray(jax.vmap(draw)(jax.random.split(KEY, 500)))
    assert sides.min() >= 1
    assert sides.max() <= 33
    if aspect == 1 or area == 1:
        np.testing.assert_array_equal(sides, round(33 * math.sqrt(area)))


def test_one_program_makes_all_crops(mosaic):
    resize = jax.jit(lambda *box: crops.resize_crop(planes(mosaic), *box, 32, "bicubic"))
    for top, left, *sides in BOXES:
        resize(top, left, jnp.array(sides))
    assert resize._cache_size() == 1


OPTIONS = {"patch_size": 20, "patch_aspect": 4 / 3, "interpolation": "bicubic"}


def test_patches_of_any_aspect_depend_only_on_key_index_and_number(golden):
    images = jnp.asarray(golden("augmentations")["images"])
    make = jax.jit(functools.partial(patches.multi_patch, KEY, **OPTIONS), static_argnames="num_patches")
    indices = jnp.array([7, 3, 11, 5])
    expected = make(images, num_patches=4, indices=indices)
    assert expected.shape == (4, 4, 20, 20, 3)
    assert float(jnp.max(jnp.abs(expected))) <= 1.00001
    np.testing.assert_array_equal(expected, make(images[::-1], num_patches=4, indices=indices[::-1])[::-1])
    later = make(images, num_patches=4, indices=indices, first_patch=2)
    np.testing.assert_array_equal(expected[:, 2:], later[:, :2])
    parts = [make(images, num_patches=2, indices=indices, first_patch=first) for first in (0, 2)]
    # A different number of patches compiles a different program, which rounds differently on some processors.
    np.testing.assert_allclose(expected, jnp.concatenate(parts, axis=1), atol=1e-6)


def test_crops_of_any_aspect_reach_every_position(monkeypatch):
    """The pixels of the image hold their own coordinates. Without augmentations, crops keep these values."""
    monkeypatch.setattr(patches, "apply_recipe", lambda patch, recipe: patch)
    rows, columns = np.meshgrid(np.arange(64.0), np.arange(64.0), indexing="ij")
    image = np.stack([rows, columns, rows], axis=-1)[None]
    made = jax.jit(lambda image: patches.multi_patch(KEY, image, 3000, patch_size=4, patch_aspect=4 / 3))(image)
    values = (np.asarray(made[0]) + 1) * 127.5
    rows, columns = values[..., 0].mean(axis=(1, 2)), values[..., 1].mean(axis=(1, 2))
    for centres in (rows, columns):
        assert 13 < centres.min() < 15  # half of the shortest side, 64 * sqrt(3 / 16) = 28
        assert 48 < centres.max() < 50
        assert abs(centres.mean() - 31.5) < 5 * 10 / math.sqrt(3000)
    spans = np.ptp(values[..., 1], axis=(1, 2)) / np.ptp(values[..., 0], axis=(1, 2))
    assert 0.72 < spans.min() < 0.78
    assert 1.28 < spans.max() < 1.38
