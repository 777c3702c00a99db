"""The distribution of random patches, and the patches of a grid."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from empssl_jax.method import patches

KEY = jax.random.key(0)
multi_patch = jax.jit(patches.multi_patch, static_argnames=("num_patches", "patch_area", "patch_size"))


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
    expected = multi_patch(KEY, images, 6, patch_size=16, indices=indices)
    reordered = multi_patch(KEY, images[::-1], 6, patch_size=16, indices=indices[::-1])
    np.testing.assert_array_equal(expected, reordered[::-1])
    parts = [multi_patch(KEY, images[:2], 3, patch_size=16, indices=indices[:2], first_patch=first) for first in (0, 3)]
    np.testing.assert_array_equal(expected[:2], jnp.concatenate(parts, axis=1))
    other = multi_patch(jax.random.key(1), images, 6, patch_size=16, indices=indices)
    assert float(jnp.mean(jnp.abs(other - expected))) > 0.1


def test_without_colours_a_patch_is_a_crop_or_its_mirror_image():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    crops = [image[top : top + 4, left : left + 4] for top in range(5) for left in range(5)]
    known = {crop.tobytes() for crop in [*crops, *(crop[:, ::-1] for crop in crops)]}
    (found,) = patches.multi_patch(KEY, image[None], 200, patch_size=4, colours=False)
    pixels = np.asarray(jnp.round((found + 1) * 127.5)).astype(np.uint8)
    seen = {patch.tobytes() for patch in pixels}
    assert seen <= known
    assert len(seen) > 40  # of 50; each is missing with probability (1 - 1/50)^200 = 0.02


@pytest.fixture(scope="module")
def recipes():
    """20,000 random recipes, as NumPy arrays."""
    keys = jax.random.split(KEY, 20_000)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(lambda key: patches.draw_recipe(key, 17)))(keys))


def test_crops_are_uniform_over_all_offsets(recipes):
    counts = np.zeros((17, 17))
    np.add.at(counts, (recipes.top, recipes.left), 1)
    # chi-squared with 288 degrees of freedom: mean 288, standard deviation 24
    expected = len(recipes.top) / counts.size
    assert abs(np.sum((counts - expected) ** 2 / expected) - 288) < 5 * 24


@pytest.mark.parametrize(("name", "share"), [("mirrored", 0.5), ("jittered", 0.8), ("gray", 0.2), ("solarized", 0.1)])
def test_each_choice_has_its_probability(recipes, name, share):
    chosen = getattr(recipes, name)
    assert abs(chosen.mean() - share) < 5 * np.sqrt(share * (1 - share) / len(chosen))


def test_numbers_are_uniform_in_their_ranges(recipes):
    blurred = recipes.blur_sigma > 0
    assert abs(blurred.mean() - 0.1) < 5 * 0.3 / np.sqrt(len(blurred))
    for values, low, high in (
        (recipes.factors, 0.6, 1.4),
        (recipes.hue_shift, -0.2, 0.2),
        (recipes.blur_sigma[blurred], 0.1, 2.0),
    ):
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        deviation = (high - low) / np.sqrt(12 * len(values))
        assert np.all(np.abs(values.mean(axis=0) - (low + high) / 2) < 5 * deviation)


def test_choices_are_independent(recipes):
    """No two numbers of a recipe are correlated."""
    columns = [np.reshape(values, (len(recipes.top), -1)).astype(float) for values in recipes]
    places = list(recipes._fields).index("places")
    columns[places] = columns[places][:, :1]  # the places of a recipe are a permutation, so they depend on each other
    correlations = np.corrcoef(np.concatenate(columns, axis=1), rowvar=False)
    # blur_sigma is zero without a blur; the zeros are included.
    assert np.abs(correlations - np.eye(len(correlations))).max() < 5 / np.sqrt(len(recipes.top))


def test_orders_of_the_jitter_are_uniform(recipes):
    _, counts = np.unique(recipes.places @ [64, 16, 4, 1], return_counts=True)
    assert len(counts) == 24
    expected = len(recipes.top) / 24
    assert np.sum((counts - expected) ** 2 / expected) < 23 + 5 * np.sqrt(46)


def test_a_patch_is_mirrored_where_the_recipe_says():
    patch = jax.random.uniform(KEY, (3, 16, 16), maxval=255.0)
    nothing = patches.draw_recipe(KEY, 17)._replace(
        jittered=False, gray=False, blur_sigma=jnp.zeros([]), solarized=False
    )
    kept, mirrored = (patches.apply_recipe(patch, nothing._replace(mirrored=choice)) for choice in (False, True))
    np.testing.assert_allclose(kept, patch, atol=1e-3)
    np.testing.assert_allclose(mirrored, patch[:, :, ::-1], atol=1e-3)


def test_how_often_each_augmentation_applies():
    """All crops of an image of one saturated colour are equal, so the pixels of a patch show what changed it."""
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image[..., 0] = 90
    image[..., 1] = 30
    out = np.asarray(multi_patch(KEY, image, 4000, patch_size=16))[0]
    pixels = (out + 1) * 127.5
    gray = np.ptp(pixels, axis=-1).max(axis=(1, 2)) < 0.5
    assert abs(gray.mean() - 0.2) < 0.032
    original = np.all(np.abs(pixels - image[0, :1, :1]) < 0.5, axis=(1, 2, 3))
    # Neither jittered nor gray. Solarization changes no value below 128, and blur has no effect on one colour.
    assert abs(original.mean() - 0.2 * 0.8) < 0.03


@pytest.mark.parametrize(("grid_side", "places"), [(1, [8]), (2, [0, 16]), (4, [0, 5, 11, 16])])
def test_grid_patches_are_plain_crops_from_edge_to_edge(grid_side, places):
    images = np.random.RandomState(0).randint(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    crops = [images[:, top : top + 16, left : left + 16] for top in places for left in places]
    for number, crop in enumerate(crops):
        made = patches.grid_patch(images, number, grid_side, patch_size=16)
        np.testing.assert_allclose(made, crop / 127.5 - 1.0, atol=1e-6)


def test_grid_patches_are_resized_as_pil_does_it():
    images = np.random.RandomState(0).randint(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    made = np.asarray(patches.grid_patch(images, 2, 2, patch_area=0.5, patch_size=32))[0]
    crop = PIL.Image.fromarray(images[0, 9:, :23])  # the lower left one of 2 x 2 crops of 23 pixels
    expected = np.asarray(crop.resize((32, 32), PIL.Image.Resampling.BILINEAR))
    np.testing.assert_allclose((made + 1) * 127.5, expected, atol=1.01)
