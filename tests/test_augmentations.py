"""Compares each augmentation with torchvision on PIL images."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empssl_jax.method import augmentations


def planes(images):
    return jnp.moveaxis(jnp.asarray(images, jnp.float32), -1, 1)


def assert_close(ours, theirs, largest, mean):
    difference = np.abs(np.moveaxis(np.asarray(ours), 1, -1) - theirs.astype(np.float64))
    assert difference.max() <= largest
    assert difference.mean() <= mean


def adjust(which, patch, factor):
    return augmentations.adjust(patch, which, factor)


IMAGE_OPERATIONS = {
    "brightness": (functools.partial(adjust, 0), "factor", 1.5, 1.5),
    "contrast": (functools.partial(adjust, 1), "factor", 1.5, 1.5),
    "saturation": (functools.partial(adjust, 2), "factor", 1.5, 1.5),
    "hue": (augmentations.adjust_hue, "factor", 3.0, 1.5),
    "blur": (augmentations.gaussian_blur, "sigma", 12.0, 2.0),
}


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


def test_golden_fixed_operations(golden):
    numbers = golden("augmentations")
    images = planes(numbers["images"])
    assert_close(jax.vmap(augmentations.grayscale)(images), numbers["grayscale"], 1.5, 1.5)
    assert_close(jax.vmap(augmentations.solarize)(images), numbers["solarize"], 1.5, 1.5)
    assert_close(jax.vmap(augmentations.mirror)(images), numbers["flip"], 0, 0)


def test_color_jitter_equals_its_operations_in_order(golden):
    """The branch-free form equals the four operations in sequence, for every order."""
    image = planes(golden("augmentations")["images"])[3]
    operations = [jax.jit(functools.partial(adjust, which)) for which in range(3)] + [jax.jit(augmentations.adjust_hue)]
    color_jitter = jax.jit(augmentations.color_jitter)
    values = 1.4, 1.4, 1.4, -0.15  # large enough that clipping depends on the order
    orders = list(itertools.permutations(range(4)))
    jittered = np.zeros((24, *image.shape))
    expected = np.zeros_like(jittered)
    for i, order in enumerate(orders):
        patch = image
        for which in order:
            patch = operations[which](patch, jnp.float32(values[which]))
        expected[i] = patch
        places, factors, shift = jnp.argsort(jnp.array(order)), jnp.array(values[:3]), jnp.float32(values[3])
        jittered[i] = color_jitter(image, places, factors, shift)
    # Rounding moves a few pixels to the next level of 8-bit hue and saturation. Which ones depends on the processor.
    difference = np.mean(np.abs(jittered[:, None] - expected), axis=(2, 3, 4))
    assert np.max(np.diag(difference)) < 0.1
    assert np.min(difference + np.eye(24)) > 0.3
