"""Bag-of-features embeddings are means over patches and depend on neither batches nor devices."""

import dataclasses
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from PIL import Image

from empssl_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, PatchConfig
from empssl_jax.config.errors import DivergenceError, UserError
from empssl_jax.data.datasets import Datasets, ImageDataset, load_split
from empssl_jax.evaluation import embedding_files, embeddings
from empssl_jax.evaluation.evaluate import have_labels, measure_knn, measure_linear
from empssl_jax.evaluation.run_embeddings import run_embeddings
from empssl_jax.method.encoder import encoder_graph, init_encoder
from empssl_jax.method.patches import multi_patch
from empssl_jax.method.random_keys import embedding_patches_key
from empssl_jax.method.resnet import cell_means, stage_dims
from empssl_jax.runtime.devices import device_mesh

CONFIG = Config(
    data=DataConfig(dataset="digits", test_images_per_class=2),
    patches=PatchConfig(patch_size=16),
    model=ModelConfig(width=2, hidden_dim=8, projection_dim=4, precision="float32"),
    evaluation=EvaluationConfig(valid_patches=5),
)


@pytest.fixture(scope="module")
def encoder_state():
    return init_encoder(CONFIG.model, jax.random.key(0))


@pytest.fixture(scope="module")
def digits():
    return load_split(CONFIG.data, "test", None)


def embed_all(encoder_state, digits, num_devices, batch_size):
    mesh = device_mesh(num_devices)
    embed = embeddings.make_embed(CONFIG, mesh)
    return embeddings.embed_dataset(embed, encoder_state, digits, batch_size, mesh, "test")


def test_an_embedding_is_the_mean_feature_of_the_image_s_patches(encoder_state, digits):
    ours = embed_all(encoder_state, digits, 1, 20)
    key = embedding_patches_key(CONFIG.training.seed)
    patches = jax.jit(lambda images: multi_patch(key, images, 5, patch_size=16))(digits.images)
    encoder = nnx.merge(encoder_graph(CONFIG.model), *encoder_state)
    encoder.eval()
    features = jax.jit(lambda patches: encoder.embed(patches))(patches.reshape(-1, 16, 16, 3)).reshape(20, 5, -1)
    np.testing.assert_allclose(ours.embeddings, np.mean(features, axis=1), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(ours.labels, digits.labels)


def test_an_embedding_of_a_grid_is_the_mean_feature_of_its_plain_crops(encoder_state, digits):
    evaluation = EvaluationConfig(valid_patches=9, valid_crops="grid")
    mesh = device_mesh(1)
    embed = embeddings.make_embed(dataclasses.replace(CONFIG, evaluation=evaluation), mesh)
    ours = embeddings.embed_dataset(embed, encoder_state, digits, 20, mesh, "test")
    starts = range(0, 17, 8)
    crops = np.stack([digits.images[:, i : i + 16, j : j + 16] / np.float32(127.5) - 1 for i in starts for j in starts])
    encoder = nnx.merge(encoder_graph(CONFIG.model), *encoder_state)
    encoder.eval()
    features = jax.jit(lambda patches: encoder.embed(patches))(crops.reshape(-1, 16, 16, 3)).reshape(9, 20, -1)
    np.testing.assert_allclose(ours.embeddings, np.mean(features, axis=0), rtol=1e-4, atol=1e-6)


def embed_grid(encoder_state, images, **options):
    evaluation = EvaluationConfig(**{"valid_crops": "grid"} | options)
    mesh = device_mesh(1)
    embed = embeddings.make_embed(dataclasses.replace(CONFIG, evaluation=evaluation), mesh)
    return embeddings.embed_dataset(embed, encoder_state, images, 20, mesh, "test").embeddings


def test_the_last_of_the_stages_makes_the_hidden_features(encoder_state, digits):
    stages = embed_grid(encoder_state, digits, valid_patches=1, embedded_layer="stages")
    assert stages.shape == (20, sum(stage_dims(CONFIG.model)))
    encoder = nnx.merge(encoder_graph(CONFIG.model), *encoder_state)
    encoder.eval()
    hidden = nnx.relu(encoder.hidden_norm(encoder.hidden(stages[:, -stage_dims(CONFIG.model)[-1] :])))
    np.testing.assert_allclose(embed_grid(encoder_state, digits, valid_patches=1), hidden, rtol=1e-4, atol=1e-6)


def test_the_mean_of_all_cells_is_the_embedding_of_the_whole_image(encoder_state, digits):
    cells = embed_grid(encoder_state, digits, valid_patches=36, cells=3).reshape(20, 9, -1)
    whole = embed_grid(encoder_state, digits, valid_patches=36)
    np.testing.assert_allclose(np.mean(cells, axis=1), whole, rtol=1e-4, atol=1e-6)


def test_a_cell_sees_only_its_own_patches(encoder_state, digits):
    changed = digits.images.copy()
    changed[:, :8, -8:] = 255 - changed[:, :8, -8:]  # the top right corner
    pair = [
        embed_grid(encoder_state, digits._replace(images=images), valid_patches=16, cells=2).reshape(20, 4, -1)
        for images in (digits.images, changed)
    ]
    differs = [not np.array_equal(before, after) for before, after in zip(*np.swapaxes(pair, 1, 2), strict=True)]
    assert differs == [False, True, False, False]


@pytest.mark.parametrize("layer", ["hidden", "stages"])
def test_cells_of_the_whole_image_average_their_quarter_of_its_maps(encoder_state, digits, layer):
    """Patches of 16x16 are not enlarged here, so neither is the image of 32x32."""
    options = {"embedded_layer": layer, "cells": 2}
    whole = embed_grid(encoder_state, digits, valid_crops="whole", valid_patches=1, **options)
    encoder = nnx.merge(encoder_graph(CONFIG.model), *encoder_state)
    encoder.eval()
    maps = jax.jit(lambda images: encoder.backbone.stage_maps(images))(digits.images / np.float32(127.5) - 1)
    assert [x.shape[1] for x in maps] == [32, 16, 8, 4]
    halves = [(slice(0, n // 2), slice(n // 2, n)) for n in (32, 16, 8, 4)]
    quarters = [
        [np.mean(x[:, h[row], h[column]], axis=(1, 2)) for x, h in zip(maps, halves, strict=True)]
        for row in (0, 1)
        for column in (0, 1)
    ]
    features = [
        np.concatenate(means, 1) if layer == "stages" else nnx.relu(encoder.hidden_norm(encoder.hidden(means[-1])))
        for means in quarters
    ]
    np.testing.assert_allclose(whole, np.concatenate(features, axis=1), rtol=1e-4, atol=1e-5)
    both = embed_grid(encoder_state, digits, valid_crops="grid+whole", valid_patches=16, **options)
    grid = embed_grid(encoder_state, digits, valid_patches=16, **options)
    np.testing.assert_allclose(both, np.concatenate([grid, whole], axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("crops", "patches", "views"), [("grid", 16, 1), ("whole", 1, 1), ("grid+whole", 16, 2)])
def test_hidden_features_follow_the_stages_and_are_averaged_over_all_cells(
    encoder_state, digits, crops, patches, views
):
    options = {"valid_crops": crops, "valid_patches": patches, "cells": 2}
    stages, hidden = (
        embed_grid(encoder_state, digits, embedded_layer=layer, **options) for layer in ("stages", "hidden")
    )
    both = embed_grid(encoder_state, digits, embedded_layer="stages+hidden", **options)
    mean = np.mean(hidden.reshape(20, 4 * views, -1), axis=1)
    np.testing.assert_allclose(both, np.concatenate([stages, mean], axis=1), rtol=1e-5, atol=1e-6)
    evaluation = EvaluationConfig(embedded_layer="stages+hidden", **options)
    assert embeddings.embedding_dim(dataclasses.replace(CONFIG, evaluation=evaluation)) == both.shape[1]


def test_the_whole_image_has_the_scale_of_the_patches(encoder_state, digits):
    """Crops of half of the side, resized to 32, become twice as large; so does the image, as PIL does it."""
    config = dataclasses.replace(
        CONFIG,
        patches=PatchConfig(patch_size=32),
        evaluation=EvaluationConfig(valid_crops="whole", valid_patches=1, embedded_layer="stages"),
    )
    ours = embeddings.make_embed(config, device_mesh(1))(encoder_state, digits.images, jnp.arange(20))
    large = [Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR) for image in digits.images]
    encoder = nnx.merge(encoder_graph(CONFIG.model), *encoder_state)
    encoder.eval()
    maps = jax.jit(lambda images: encoder.backbone.stage_maps(images))(np.stack(large) / np.float32(127.5) - 1)
    expected = np.concatenate([np.mean(x, axis=(1, 2)) for x in maps], axis=1)
    np.testing.assert_allclose(ours, expected, rtol=0.01, atol=0.01)  # PIL rounds to whole numbers


def test_a_position_between_two_cells_counts_half_for_each():
    x = jnp.arange(9.0).reshape(1, 3, 3, 1)  # rows 0 1 2, 3 4 5, 6 7 8
    means = cell_means(x, cells=2)[0, :, 0]
    np.testing.assert_allclose(means, [(4 * 0 + 2 * 1 + 2 * 3 + 4) / 9, 24 / 9, 48 / 9, 60 / 9], rtol=1e-6)
    np.testing.assert_allclose(cell_means(x[:, :1, :1] + 5, cells=2), np.full((1, 4, 1), 5.0))


def test_embeddings_depend_on_neither_batches_nor_devices(encoder_state, digits):
    expected = embed_all(encoder_state, digits, 1, 20).embeddings
    np.testing.assert_allclose(expected, embed_all(encoder_state, digits, 8, 9).embeddings, rtol=1e-4, atol=1e-6)


def test_embeddings_that_are_not_finite_are_refused(encoder_state, digits):
    broken = encoder_state._replace(params=jax.tree.map(lambda x: x * jnp.nan, encoder_state.params))
    with pytest.raises(DivergenceError, match="The embeddings are not all finite: train again with a lower --learning"):
        embed_all(broken, digits, 1, 20)


def test_saving_and_loading(tmp_path):
    split = embeddings.LabelledEmbeddings(
        np.arange(6, dtype=np.float32).reshape(3, 2), np.array([1, 0, 1], np.int32), ("cat", "Hündin", "ox", "no image")
    )
    embedding_files.save_embeddings(tmp_path / "new" / "test.npz", split)
    loaded = embedding_files.read_split(tmp_path / "new" / "test.npz")
    np.testing.assert_array_equal(loaded.embeddings, split.embeddings)
    np.testing.assert_array_equal(loaded.labels, split.labels)
    assert (loaded.class_names, loaded.num_classes) == (split.class_names, 4)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["test.npz"]


def test_images_are_embedded_again_if_any_of_them_changes(encoder_state, tmp_path, monkeypatch):
    embedded = []

    def record(embed, state, images, batch_size, mesh, name):
        embedded.append(name)
        vectors = np.ones((len(images.labels), 1), np.float32)
        return embeddings.LabelledEmbeddings(vectors, images.labels, images.class_names)

    monkeypatch.setattr(embeddings, "embed_dataset", record)
    train = ImageDataset(np.zeros((3000, 2, 2, 3), np.uint8), np.zeros(3000, np.int32), ("a",))
    changed = train._replace(images=train.images.copy())
    changed.images[1, 0, 0, 0] = 1
    for bank in (train, train, changed):
        run_embeddings(CONFIG, encoder_state, Datasets(bank, bank, train), device_mesh(1), tmp_path)
    assert embedded == ["train", "test", "train"]


def test_memory_does_not_grow_with_the_number_of_patches(encoder_state):
    def temporaries(num_patches):
        evaluation = EvaluationConfig(valid_patches=num_patches)
        embed = embeddings.make_embed(dataclasses.replace(CONFIG, evaluation=evaluation), device_mesh(1))
        images, indices = jnp.zeros((10, 32, 32, 3), jnp.uint8), jnp.arange(10)
        return jax.jit(embed).lower(encoder_state, images, indices).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(64) == temporaries(2)


def test_images_without_labels_count_in_neither_measure(tmp_path, capsys):
    """Unlabelled embeddings lie where they would otherwise change every vote and every gradient."""
    random = np.random.RandomState(0)
    mesh, config = device_mesh(2), EvaluationConfig(num_neighbours=3, linear_epochs=3, linear_batch_size=4)
    some, mixed = {}, {}
    for split, size in (("train", 12), ("test", 8)):
        labels = np.arange(size).astype(np.int32) % 3
        features = random.randn(size, 4).astype(np.float32)
        some[split] = embeddings.LabelledEmbeddings(features, labels, ("a", "b", "c"))
        at = np.sort(random.randint(0, size, 5))
        mixed[split] = embeddings.LabelledEmbeddings(
            np.insert(features, at, 9.0, axis=0), np.insert(labels, at, -1).astype(np.int32), ("a", "b", "c")
        )
        embedding_files.save_embeddings(tmp_path / f"{split}.npz", mixed[split])
    some, mixed = (embeddings.Embeddings(split["train"], split["test"]) for split in (some, mixed))
    loaded = embedding_files.load_both_embeddings(tmp_path)
    for measure in (measure_knn, lambda *args: measure_linear(*args[:2], 0, mesh)):
        expected = measure(some, config, mesh)
        assert measure(mixed, config, mesh) == measure(loaded, config, mesh) == expected
    assert have_labels(mixed)
    assert not have_labels(mixed._replace(test=mixed.test._replace(labels=np.full(13, -1, np.int32))))
    assert capsys.readouterr().out == "no test image has a label: kNN and linear are not measured\n"


CAT, DOG, FOX, OWL = range(4)  # the direction of each animal's embeddings


def write_animals(folder, split, names, *animals):
    """Writes a file with one image of each of `animals`, numbered as in `names`; for None, its own number."""
    known = ["cat", "dog", "fox", "owl"] if names is None else names
    labels = np.array([known.index(["cat", "dog", "fox", "owl"][animal]) for animal in animals])
    arrays = {} if names is None else {"class_names": np.array(names)}
    np.savez(folder / f"{split}.npz", embeddings=np.eye(4)[list(animals)], labels=labels, **arrays)


@pytest.mark.parametrize(
    ("train", "test", "accuracy", "shown"),
    [
        (["cat", "dog", "fox"], ["dog", "cat", "fox"], 1.0, ""),
        (["cat", "dog", "fox"], ["fox", "dog"], 1.0, ""),
        (["cat", "dog"], ["owl", "dog", "cat"], 2 / 3, "no training images count as wrong: 1 of 3, such as 'owl'"),
        (["owl", "dog", "cat"], ["cat", "dog"], 1.0, ""),
        (None, ["cat", "dog", "fox"], 1.0, "train.npz has no class_names: its labels are the numbers of the classes"),
        (["cat", "dog", "fox"], None, 1.0, "test.npz has no class_names: its labels are the numbers of the classes"),
        (None, None, 1.0, ""),
    ],
)
def test_classes_of_two_files_are_matched_by_name(tmp_path, capsys, train, test, accuracy, shown):
    """Each animal has its own embedding, so only an animal that is not trained on is wrong."""
    numbers = {"cat": CAT, "dog": DOG, "fox": FOX, "owl": OWL}
    for split, names in (("train", train), ("test", test)):
        write_animals(tmp_path, split, names, *(numbers[name] for name in names or ["dog", "cat", "fox"]))
    both = embedding_files.load_both_embeddings(tmp_path)
    assert have_labels(both)
    assert re.search(shown, capsys.readouterr().out)
    knn = measure_knn(both, EvaluationConfig(num_neighbours=1), device_mesh(1))
    assert knn == pytest.approx({"top1": accuracy, "top5": accuracy})


def test_every_class_keeps_its_name_when_the_test_file_has_more(tmp_path):
    write_animals(tmp_path, "train", ["cat", "dog"], CAT, DOG)
    write_animals(tmp_path, "test", ["owl", "dog", "fox", "cat"], OWL, DOG, FOX, CAT)
    bank, test = embedding_files.load_both_embeddings(tmp_path)
    assert (bank.class_names, bank.labels.tolist()) == (("cat", "dog"), [0, 1])
    assert [test.class_names[label] for label in test.labels] == ["owl", "dog", "fox", "cat"]
    assert test.class_names[:2] == bank.class_names
    config = EvaluationConfig(linear_epochs=50, linear_learning_rate=1.0)
    linear = measure_linear(embeddings.Embeddings(bank, test), config, 0, device_mesh(1))["linear"]
    assert linear == {"top1": 0.5, "top5": 0.5}  # of the owl, the dog, the fox and the cat


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (["cat", "cat", "dog"], ["cat", "dog"], "train.npz has 2 classes of the name 'cat', .*: give each class its"),
        (["cat", "dog"], ["cat", "dog", "dog"], "test.npz has 2 classes of the name 'dog', .*: give each class its"),
        (["cat", "dog"], ["Cat", "Dog"], "train.npz has classes such as 'cat', .* 'Cat': give both files the same"),
    ],
)
def test_names_that_do_not_fit_together_are_refused(tmp_path, train, test, message):
    for split, names in (("train", train), ("test", test)):
        np.savez(tmp_path / f"{split}.npz", embeddings=np.eye(2), labels=np.arange(2), class_names=names)
    with pytest.raises(UserError, match=f"^--embeddings: {message}"):
        embedding_files.load_both_embeddings(tmp_path)


def test_two_classes_of_one_name_stay_two_if_both_files_have_them(tmp_path):
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", embeddings=np.eye(2), labels=np.array([1, -1]), class_names=["cat", "cat"])
    bank, test = embedding_files.load_both_embeddings(tmp_path)
    assert (bank.num_classes, bank.labels.tolist(), test.labels.tolist()) == (2, [1, -1], [1, -1])


@pytest.mark.parametrize(("platform", "given", "expected"), [("cpu", None, 250), ("gpu", None, 2000), ("gpu", 7, 7)])
def test_the_batch_size_is_the_option_s_or_that_of_the_devices(platform, given, expected):
    mesh = mock.Mock(spec=Mesh, devices=np.array([mock.Mock(platform=platform)] * 2), size=2)
    assert embeddings.batch_size_of(EvaluationConfig(embedding_batch_size=given), mesh) == expected
