"""ONNX files: onnxruntime computes the embeddings of JAX from them, and what they cannot hold is refused."""

import sys

import jax
import numpy as np
import pytest

import empssl_jax
from empssl_jax import command_line, inference, parse_options
from empssl_jax.config import Config, EmbeddingConfig, EvaluationConfig, ModelConfig, PatchConfig
from empssl_jax.config.errors import UserError
from empssl_jax.inference.image_encoder import ImageEncoder
from empssl_jax.method.encoder import init_encoder

GRID = ("--valid-crops", "grid", "--valid-patches", "4")


def export(*arguments):
    """Runs `empssl export ...` in this process, where errors raise."""
    command_line.export([*map(str, arguments)], "empssl export")


def images_of(side):
    """Five images: noise, and stripes whose cubic interpolation overshoots."""
    images = np.random.RandomState(0).randint(0, 256, (5, side, side, 3), dtype=np.uint8)
    images[0] = 255 * (np.arange(side) // 3 % 2)[:, None, None]
    return images


def assert_computes(model, encoder):
    """Both give the same embeddings, for one image and for several."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model)
    images = images_of(encoder.image_size)
    expected = encoder.embed(images)
    for size in (5, 1):
        (embeddings,) = session.run(["embeddings"], {"images": images[:size]})
        assert embeddings.dtype == np.float32
        np.testing.assert_allclose(embeddings, expected[:size], rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("crops", "patches", "layer", "cells"),
    [
        ("grid", 1, "hidden", 1),
        ("grid", 16, "stages", 2),
        ("whole", 1, "stages", 3),
        ("grid+whole", 9, "hidden", 3),
        ("grid+whole", 4, "stages+hidden", 2),
    ],
)
def test_a_run_s_embedder(tiny_run, tmp_path, crops, patches, layer, cells):
    pytest.importorskip("onnx")
    options = {"valid_crops": crops, "valid_patches": patches, "embedded_layer": layer, "cells": cells}
    given = [text for name, value in options.items() for text in ("--" + name.replace("_", "-"), str(value))]
    file = tmp_path / "new/embedder.onnx"
    export("--format", "onnx", "--step", "1", *given, tiny_run, "--output", file)
    assert_computes(file.read_bytes(), empssl_jax.load(tiny_run, 1, **options))


def test_every_other_layer():
    """Bottlenecks, pooling, statistics far from the initial ones, input that is normalised, cubic filters, odd size."""
    onnx_graph = pytest.importorskip("empssl_jax.inference.onnx_graph", exc_type=ImportError)
    made = Config(
        model=ModelConfig(
            backbone="resnet50",
            stem="imagenet",
            width=2,
            hidden_dim=5,
            projection_dim=2,
            precision="float32",
            input_mean=(0.5, 0.4, 0.3),
            input_std=(0.2, 0.3, 0.4),
        ),
        patches=PatchConfig(patch_size=45, patch_area=0.3, interpolation="bicubic"),
        evaluation=EvaluationConfig(valid_patches=1, valid_crops="whole", cells=2, embedding_batch_size=5),
    )
    random = np.random.RandomState(0)
    state = jax.tree.map(
        lambda a: a * random.uniform(0.5, 1.5, a.shape).astype(np.float32) + (a.ndim == 1) * np.float32(0.1),
        init_encoder(made.model, jax.random.key(0)),
    )
    encoder = ImageEncoder(made, state, 0, image_size=37)
    assert_computes(onnx_graph.to_onnx(encoder, {}), encoder)


def test_the_file_describes_itself(tiny_run):
    onnx = pytest.importorskip("onnx")
    export(tiny_run, "--format", "onnx", *GRID)
    model = onnx.load(tiny_run / "embedder.onnx")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert (metadata["step"], metadata["image_size"]) == ("2", "32")
    assert metadata["embedding"] == "4 grid patches, hidden"
    (images,), (embeddings,) = model.graph.input, model.graph.output
    for array, shape in ((images, ["N", 32, 32, 3]), (embeddings, ["N", 32])):
        assert [d.dim_param or d.dim_value for d in array.type.tensor_type.shape.dim] == shape


def test_weights_are_stored_once_for_two_views(tiny_run, tmp_path):
    pytest.importorskip("onnx")
    export(tiny_run, "--format", "onnx", *GRID, "--output", tmp_path / "one")
    export(tiny_run, "--format", "onnx", *GRID, "--valid-crops", "grid+whole", "--output", tmp_path / "two")
    assert (tmp_path / "two").stat().st_size < 1.3 * (tmp_path / "one").stat().st_size


def test_what_a_file_cannot_hold_is_refused(tiny_run, tmp_path, monkeypatch):
    onnx_graph = pytest.importorskip("empssl_jax.inference.onnx_graph", exc_type=ImportError)
    to_file = (tiny_run, "--format", "onnx", "--output", tmp_path / "a.onnx")
    with pytest.raises(
        UserError, match=r"--valid-crops is 'random': an ONNX file cannot draw .* add --valid-crops grid"
    ):
        export(*to_file)
    with pytest.raises(UserError, match="--valid-patches is 0: give the number of patches"):
        export(*to_file, "--valid-crops", "grid", "--valid-patches", "0")
    monkeypatch.setattr(onnx_graph, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match=r"has \d+ bytes and an ONNX file at most 1000: give another --format"):
        export(*to_file, *GRID)
    assert not (tmp_path / "a.onnx").exists()


def test_weights_take_no_options_of_the_embedding(tiny_run, tmp_path):
    to_file = (tiny_run, "--output", tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="--valid-patches is 4: a file of format safetensors holds weights only"):
        export(*to_file, *GRID)
    assert not (tmp_path / "a.safetensors").exists()
    export(*to_file, "--embedded-layer", "hidden")  # the run's own value
    assert (tmp_path / "a.safetensors").exists()


def test_without_onnx_the_remedy_is_named(tiny_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "empssl_jax.inference.onnx_graph", raising=False)
    monkeypatch.delattr(inference, "onnx_graph", raising=False)
    with pytest.raises(UserError, match=r'--format onnx needs the package onnx: pip install -e "\.\[onnx\]"'):
        export(tiny_run, "--format", "onnx", *GRID)


def test_options_that_are_not_given_are_those_of_the_run(tiny_run):
    assert parse_options.parse_export_options([str(tiny_run)]).embedding.valid_patches == 2
    for arguments in ([tiny_run, *GRID], [*GRID, tiny_run]):
        options = parse_options.parse_export_options([*map(str, arguments), "--format", "onnx"])
        assert options.run == str(tiny_run)
        assert options.embedding == EmbeddingConfig(valid_patches=4, valid_crops="grid")
