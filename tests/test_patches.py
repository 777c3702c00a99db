"""Each augmentation against torchvision on PIL, and the distribution of whole patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empssl_jax import patches

IMAGE_OPERATIONS = {
    "brightness": (patches.adjust_brightness, "factor", 1.5, 1.5),
    "contrast": (patches.adjust_contrast, "factor", 1.5, 1.5),
    "saturation": (patches.adjust_saturation, "factor", 1.5, 1.5),
    "hue": (patches.adjust_hue, "factor", 3.0, 1.5),
    "blur": (patches.gaussian_blur, "sigma", 12.0, 2.0),
}
KEY = jax.random.key(0)
multi_patch = jax.jit(patches.multi_patch, static_argnames=("num_patches", "patch_area", "patch_size"))


def planes(images):
    return jnp.moveaxis(jnp.asarray(images, jnp.float32), -1, 1)


def assert_close(ours, theirs, largest, mean):
    difference = np.abs(np.moveaxis(np.asarray(ours), 1, -1) - theirs.astype(np.float64))
    assert difference.max() <= largest
    assert difference.mean() <= mean


@pytest.mark.parametrize("name", IMAGE_OPERATIONS)
def test_golden_parameterised_operations(golden, name):
    numbers = golden("augmentations")
    operation, parameter, largest, mean = IMAGE_OPERATIONS[name]
    cases = [key for key in numbers if key.startswith(f"{name}_") and "/" not in key]
    assert cases
    for case in cases:
        value = float(numbers[f"{case}/{parameter}"])
        ours = jax.vmap(lambda image, value=value: operation(image, jnp.float32(value)))(planes(numbers["images"]))
        assert_close(ours, numbers[case], largest, mean)


def test_golden_crop(golden):
    numbers = golden("augmentations")
    cases = [key for key in numbers if key.startswith("crop_") and "/" not in key]
    assert cases
    for case in cases:
        top, left, size = (int(numbers[f"{case}/{name}"]) for name in ("top", "left", "size"))
        side, target = numbers["images"].shape[1], numbers[case].shape[1]
        table = patches.crop_table(side, size, target)
        ours = jax.vmap(lambda image, t=table, i=top, j=left: patches.apply_to_axes(image, t[i], t[j]))
        assert_close(ours(planes(numbers["images"])), numbers[case], 1.5, 1.5)


def test_golden_fixed_operations(golden):
    numbers = golden("augmentations")
    images = planes(numbers["images"])
    assert_close(jax.vmap(patches.grayscale)(images), numbers["grayscale"], 1.5, 1.5)
    assert_close(jax.vmap(patches.solarize)(images), numbers["solarize"], 1.5, 1.5)
    side = images.shape[-1]
    mirrored = jax.vmap(lambda image: patches.apply_to_axes(image, jnp.eye(side), jnp.eye(side)[::-1]))(images)
    assert_close(mirrored, numbers["flip"], 1.5, 1.5)


def test_shapes_types_and_range(golden):
    images = jnp.asarray(golden("augmentations")["images"])
    out = multi_patch(KEY, images, 30)
    assert out.shape == (len(images), 30, 32, 32, 3)
    assert out.dtype == jnp.float32
    assert float(jnp.min(out)) >= -1.00001
    assert float(jnp.max(out)) <= 1.00001
    assert float(jnp.max(out)) > 0.5
    assert multi_patch(KEY, images, 2, patch_size=16).shape == (len(images), 2, 16, 16, 3)


def test_patches_depend_only_on_key_index_and_number(golden):
    images = jnp.asarray(golden("augmentations")["images"])
    indices = jnp.array([7, 3, 11, 5])
    whole = multi_patch(KEY, images, 6, patch_size=16, indices=indices)
    reordered = multi_patch(KEY, images[::-1], 6, patch_size=16, indices=indices[::-1])
    np.testing.assert_array_equal(whole, reordered[::-1])
    parts = [multi_patch(KEY, images[:2], 3, patch_size=16, indices=indices[:2], first_patch=first) for first in (0, 3)]
    np.testing.assert_array_equal(whole[:2], jnp.concatenate(parts, axis=1))
    other = multi_patch(jax.random.key(1), images, 6, patch_size=16, indices=indices)
    assert float(jnp.mean(jnp.abs(other - whole))) > 0.1


def test_crops_are_uniform_over_all_offsets_and_half_are_mirrored():
    """Images of their own coordinates tell where each crop came from."""
    rows, columns = jnp.meshgrid(jnp.arange(32.0), jnp.arange(32.0), indexing="ij")
    image = jnp.stack([rows, columns, rows])
    table = patches.crop_table(32, 16, 16)
    keys = jax.random.split(KEY, 20_000)
    crops = jax.jit(jax.vmap(lambda key: patches.random_crop_flip(key, image, table)))(keys)
    mirrored = np.asarray(crops[:, 1, 0, 0] > crops[:, 1, 0, -1])
    top = np.asarray(crops[:, 0, 0, 0]).round().astype(int)
    left = np.minimum(crops[:, 1, 0, 0], crops[:, 1, 0, -1]).round().astype(int)
    counts = np.zeros((17, 17))
    np.add.at(counts, (top, left), 1)
    # chi-squared with 288 degrees of freedom: mean 288, standard deviation 24
    expected = len(keys) / counts.size
    assert abs(np.sum((counts - expected) ** 2 / expected) - 288) < 5 * 24
    assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(keys))


def test_how_often_each_augmentation_applies():
    """A saturated image whose crops are all alike, with one step edge, tells what was done to a patch."""
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image[..., 0] = 90
    image[..., 1] = 30
    out = np.asarray(multi_patch(KEY, image, 4000, patch_size=16))[0]
    pixels = (out + 1) * 127.5
    gray = np.ptp(pixels, axis=-1).max(axis=(1, 2)) < 0.5
    assert abs(gray.mean() - 0.2) < 0.032
    original = np.all(np.abs(pixels - image[0, :1, :1]) < 0.5, axis=(1, 2, 3))
    # not jittered, not gray, not solarized (which does nothing below 128), blur without effect on a flat image
    assert abs(original.mean() - 0.2 * 0.8) < 0.03


def test_color_jitter_orders_are_uniform():
    """Of the 24 orders, brightness before contrast makes a difference that can be read off a gray image."""
    keys = jax.random.split(KEY, 6000)
    positions = np.asarray(jax.vmap(lambda key: jax.random.permutation(jax.random.split(key, 3)[0], 4))(keys))
    _, counts = np.unique(positions @ [64, 16, 4, 1], return_counts=True)
    assert len(counts) == 24
    assert np.sum((counts - 250) ** 2 / 250) < 23 + 5 * np.sqrt(46)


def test_color_jitter_equals_its_operations_in_order(golden):
    """The branch-free form against the four operations applied one after the other."""
    image = planes(golden("augmentations")["images"])[0]
    for seed in range(12):
        key = jax.random.key(seed)
        order_key, factor_key, hue_key = jax.random.split(key, 3)
        position = np.asarray(jax.random.permutation(order_key, 4))
        factors = jax.random.uniform(factor_key, (3,), minval=0.6, maxval=1.4)
        shift = jax.random.uniform(hue_key, minval=-0.2, maxval=0.2)
        operations = [patches.adjust_brightness, patches.adjust_contrast, patches.adjust_saturation, patches.adjust_hue]
        expected = image
        for which in np.argsort(position):
            expected = operations[which](expected, (*factors, shift)[which])
        np.testing.assert_allclose(patches.color_jitter(key, image), expected, atol=2e-3)
