"""Every block of docs/usage.md does what the page says, on a tiny run of digits instead of CIFAR-10."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import empssl_jax
from empssl_jax import config, training
from empssl_jax.data.datasets import load_split

REPOSITORY = Path(__file__).parent.parent
PAGE = (REPOSITORY / "docs" / "usage.md").read_text()
BLOCKS = re.findall(r"^```(python|sh)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder: a run of width 64, twelve photos, and a copy of the first photo as the query."""
    folder = tmp_path_factory.mktemp("usage")
    made = config.Config(
        data=config.DataConfig(dataset="digits", images_per_class=10, test_images_per_class=4),
        patches=config.PatchConfig(train_patches=2, patch_size=16),
        model=config.ModelConfig(hidden_dim=32, projection_dim=16, precision="float32"),
        training=config.TrainingConfig(batch_size=40),
        evaluation=config.EvaluationConfig(valid_patches=2, embedding_batch_size=16, linear_epochs=0, report=False),
        run=config.RunConfig(workdir=str(folder / "runs" / "cifar10")),
    )
    training.train(made)
    (folder / "photos").mkdir()
    for number, image in enumerate(load_split(made.data, "test", None).images[:12]):
        PIL.Image.fromarray(image).save(folder / "photos" / f"{number:02}.png")
    (folder / "query.png").write_bytes((folder / "photos" / "00.png").read_bytes())
    return folder


@pytest.fixture(scope="module")
def run_block(folder):
    """Runs a block after the previous ones and returns the Python namespace that they share."""
    namespace: dict = {}

    def run(language, block):
        if language == "python":
            exec(compile(block, "docs/usage.md", "exec"), namespace)
            return namespace
        paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
        subprocess.run(["bash", "-euc", block], env=os.environ | paths, check=True)
        return namespace

    return run


def test_the_page_has_blocks_of_python_and_of_the_shell():
    languages = ["python", "python", "python", "python", "sh", "sh", "python", "sh", "python", "sh", "sh", "python"]
    assert [language for language, _ in BLOCKS] == languages


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(folder, run_block, monkeypatch, capsys, number):
    language, block = BLOCKS[number]
    if "import torch" in block:
        pytest.importorskip("torch", reason="pip install -e '.[torch]'")
        pytest.importorskip("torchvision", reason="pip install -e '.[bench]'")
    if "onnx" in block:
        pytest.importorskip("onnx", reason="pip install -e '.[onnx]'")
        pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    monkeypatch.chdir(folder)
    CHECKS[number](run_block(language, block), capsys.readouterr().out)


def embeds_without_training(namespace, output):
    assert namespace["embeddings"].shape == (5, 3840)


def embeds(namespace, output):
    assert namespace["embeddings"].shape == (5, 32)
    np.testing.assert_array_equal(namespace["embeddings"], namespace["encoder"].embed(namespace["images"]))


def whitens(namespace, output):
    stages, hidden = 2 * 4 * (64 + 128 + 256 + 512), 32  # quarters of the grid and of the whole image
    assert namespace["searched"].shape == (5, stages + hidden)
    np.testing.assert_allclose(namespace["queries"], namespace["searched"][:2], rtol=1e-3, atol=1e-3)


def classifies(namespace, output):
    """Recomputes both figures from the embeddings in the run's folder."""
    train, test = namespace["train"], namespace["test"]
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train["embeddings"], test["embeddings"]))
    nearest = np.argsort(-(queries @ bank.T), axis=1)[:, :20]
    share = np.mean(train["labels"][nearest] == test["labels"][:, None])
    assert namespace["share_of_same_class"] == pytest.approx(share, abs=0.01)
    votes = queries @ namespace["classifier"].coef_.T + namespace["classifier"].intercept_
    assert namespace["accuracy"] == pytest.approx(np.mean(np.argmax(votes, axis=1) == test["labels"]), abs=0.03)
    assert f"classifier {namespace['accuracy']:.1%}" in output


def measures_elsewhere(namespace, output):
    names = json.loads(Path("runs/cifar10/results.json").read_text())
    assert "digits, --images-per-class 30, --test-images-per-class 10: kNN" in names
    with np.load("runs/cifar10/embeddings/test.npz") as arrays:
        assert len(arrays["labels"]) == 40
    (folder,) = (path for path in Path("runs/cifar10/embeddings").iterdir() if path.is_dir())
    with np.load(folder / "test.npz") as arrays:
        np.testing.assert_array_equal(np.bincount(arrays["labels"]), np.full(10, 10))


def embeds_files(namespace, output):
    with np.load("photos.npz") as arrays:
        assert arrays["files"].tolist() == [f"{number:02}.png" for number in range(12)]
        assert arrays["unreadable"].tolist() == []


def finds_itself_first(namespace, output):
    # The query equals the first photo and has the same index, so both give the same patches.
    assert re.match(r"1\.000 00\.png\n", output)


def exports(namespace, output):
    assert Path("encoder.safetensors").is_file()


def gives_the_same_features(namespace, output):
    """Embeds the same patches in JAX and in PyTorch."""
    from flax import nnx

    from empssl_jax.method.encoder import encoder_graph

    encoder = namespace["encoder"]
    model = nnx.merge(encoder_graph(encoder.config.model), *encoder.state)
    model.eval()
    theirs = namespace["embeddings_of_patches"].detach().numpy()
    ours = np.asarray(model.embed(jnp.asarray(np.moveaxis(namespace["patches"].numpy(), 1, -1))))
    assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max()


def imports(namespace, output):
    ours, theirs = empssl_jax.load("runs/imported"), empssl_jax.load("runs/cifar10")
    images = namespace["images"]
    np.testing.assert_array_equal(ours.embed(images), theirs.embed(images))


def exports_an_embedder(namespace, output):
    assert Path("embedder.onnx").is_file()


def gives_the_same_embeddings(namespace, output):
    expected = empssl_jax.load("runs/cifar10", valid_crops="grid", valid_patches=16).embed(namespace["images"])
    np.testing.assert_allclose(namespace["exported"], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


CHECKS = [
    embeds_without_training,
    embeds,
    whitens,
    classifies,
    measures_elsewhere,
    embeds_files,
    finds_itself_first,
    exports,
    gives_the_same_features,
    imports,
    exports_an_embedder,
    gives_the_same_embeddings,
]
