"""Encoders to PyTorch files and back: the authors' encoder, exact round trips, and errors that name the arrays."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from conftest import from_torch_layout, leaf, torch_names, torch_weights
from flax import nnx

import empssl_jax
from empssl_jax import command_line, training
from empssl_jax.config import ModelConfig
from empssl_jax.config.errors import UserError
from empssl_jax.inference import torch_names as names_module
from empssl_jax.method import encoder as models
from empssl_jax.method.random_keys import parameters_key
from empssl_jax.method.resnet import BACKBONES
from empssl_jax.method.train_step import make_optimizer
from empssl_jax.run_folder.checkpoints import Checkpoints
from empssl_jax.runtime.devices import device_mesh

KEY = jax.random.key(0)
OFFICIAL = ModelConfig(hidden_dim=64, projection_dim=32, precision="float32")


@pytest.fixture(scope="module")
def official(golden):
    """The golden numbers and a checkpoint of the authors' code."""
    numbers = {key.split("/")[1]: array for key, array in golden("backbones").items() if key.startswith("official/")}
    state = models.init_encoder(OFFICIAL, KEY)
    paths = torch_names(numbers["names"])
    shapes = {}
    for name, path in paths.items():
        tree = leaf(state.batch_stats if "running" in name else state.params, path[:-1])
        array = tree[path[-1]] if path[-1] in tree else np.zeros(64)  # a bias before a BatchNorm
        shapes[name] = array.shape if array.ndim == 1 else (*array.shape[:1:-1], *array.shape[:2])
        if array.ndim == 2:
            shapes[name] = array.shape[::-1]
    drawn = torch_weights(numbers["names"], int(golden("backbones")["official_weight_seed"]), shapes)
    counters = {str(name): np.array(1) for name in numbers["names"] if name not in paths}
    return numbers, {name: np.float32(array) for name, array in drawn.items()} | counters


def run_command(arguments):
    """Runs `empssl export ...` or `empssl import ...` in this process, where errors raise."""
    command_line.COMMANDS[arguments[0]].run(arguments[1:], "empssl")


def save(path, arrays, metadata=None):
    path.write_bytes(safetensors.numpy.save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, metadata))
    return str(path)


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def relative_error(ours, theirs) -> float:
    return float(np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs)))


def test_golden_official_checkpoint(official, tmp_path):
    numbers, arrays = official
    run_command(["import", save(tmp_path / "a.safetensors", arrays), "--workdir", str(tmp_path / "run")])
    encoder = empssl_jax.load(tmp_path / "run")
    assert encoder.step == 0
    assert encoder.config.model == OFFICIAL

    @jax.jit
    def evaluated(state, images):
        model = nnx.merge(models.encoder_graph(OFFICIAL), *state)
        model.eval()
        return model(images)

    embeddings, projections = evaluated(encoder.state, numbers["images"])
    assert relative_error(embeddings, numbers["eval_embeddings"]) < 1e-3
    unit = projections / jnp.linalg.norm(projections, axis=1, keepdims=True)
    assert relative_error(unit, numbers["eval_projections_normalised"]) < 1e-3


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_every_encoder_has_torchvision_s_names_and_an_exact_round_trip(golden, backbone, stem):
    config = ModelConfig(backbone=backbone, stem=stem, width=2, hidden_dim=3, projection_dim=2, precision="float32")
    state = models.init_encoder(config, KEY)
    arrays = names_module.to_torch(state, config, 7)
    of_resnet = {name.removeprefix("backbone.") for name in arrays if name.startswith("backbone.")}
    assert of_resnet == set(golden("backbones")[f"{backbone}-{stem}/names"])
    for name, path in torch_names(arrays).items():
        tree = leaf(state.batch_stats if "running" in name else state.params, path[:-1])
        ours = tree[path[-1]] if path[-1] in tree else np.zeros(3)
        np.testing.assert_array_equal(from_torch_layout(arrays[name]), ours, err_msg=name)
    found, back = names_module.from_torch(arrays)
    assert found == config
    assert_equal(back, state)


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_export_then_import_is_exact(tiny_run, tmp_path, kind):
    if kind == "torch":
        pytest.importorskip("torch", reason="pip install -e '.[torch]'")
    file, workdir = tmp_path / f"new/weights.{'pt' if kind == 'torch' else kind}", tmp_path / "run"
    run_command(["export", str(tiny_run), "--format", kind, "--step", "1", "--output", str(file)])
    run_command(["import", str(file), "--workdir", str(workdir)])
    ours, theirs = empssl_jax.load(workdir), empssl_jax.load(tiny_run, 1)
    assert_equal(ours.state, theirs.state)
    assert (ours.step, ours.image_size) == (0, theirs.image_size)
    run = dataclasses.replace(theirs.config.run, workdir=str(workdir))
    assert ours.config == dataclasses.replace(theirs.config, run=run)
    # Training starts from the imported encoder.
    optimizer = make_optimizer(ours.config.training, lambda step: 0.1)
    with Checkpoints(workdir) as store:
        state = training._initial_state(ours.config, optimizer, store, device_mesh())
    assert int(state.step) == 0
    assert_equal(state.encoder, theirs.state)
    other = dataclasses.replace(ours.config, model=dataclasses.replace(ours.config.model, width=8))
    with pytest.raises(UserError, match=r"holds another run: --width 8 \(was 4\)"):
        training._check_workdir(workdir, other)


def test_metadata_say_how_to_build_the_encoder(tiny_run):
    run_command(["export", str(tiny_run)])
    with safetensors.safe_open(tiny_run / "weights.safetensors", framework="numpy") as file:
        metadata = file.metadata()
        assert file.get_tensor("backbone.bn1.num_batches_tracked") == 2
    assert (metadata["backbone"], metadata["stem"], metadata["width"], metadata["step"]) == (
        "resnet18",
        "cifar",
        "4",
        "2",
    )
    assert json.loads(metadata["config"])["patches"]["patch_size"] == 16


def test_a_torchvision_resnet_gets_the_initial_heads_of_training(tmp_path):
    """The ResNet's arrays are unchanged, and its classifier is dropped."""
    model = ModelConfig(width=2, stem="imagenet", hidden_dim=3, projection_dim=2, precision="float32")
    config = f"from empssl_jax.config import *\nconfig = Config(model={model!r}, training=TrainingConfig(seed=5))\n"
    (tmp_path / "config.py").write_text(config)
    begun = models.init_encoder(model, parameters_key(5))
    other = models.init_encoder(model, parameters_key(6))
    arrays = names_module.to_torch(other, model, 0)
    resnet = {name.removeprefix("backbone."): a for name, a in arrays.items() if name.startswith("backbone.")}
    file = save(tmp_path / "a.safetensors", resnet | {"fc.weight": np.eye(2), "fc.bias": np.zeros(2)})
    command = ["import", file, "--workdir", str(tmp_path / "run"), "--config", str(tmp_path / "config.py")]
    with pytest.raises(UserError, match="These are not the arrays of an EMP-SSL encoder"):
        run_command(command)
    run_command([*command, "--fresh-heads"])
    encoder = empssl_jax.load(tmp_path / "run")
    assert encoder.config.model == model
    assert_equal(encoder.state, begun._replace(params=begun.params | {"backbone": other.params["backbone"]}))


def without(name):
    return lambda arrays: {other: array for other, array in arrays.items() if other != name}


def with_array(name, array):
    return lambda arrays: arrays | {name: array}


REFUSED = {
    "a missing array": (without("module.backbone.layer2.0.bn1.weight"), "1 missing: backbone.layer2.0.bn1.weight; 0"),
    "one too many": (with_array("module.fc.weight", np.eye(2)), "0 missing; 1 unexpected: fc.weight"),
    "no encoder": (lambda arrays: {"x": np.eye(2)}, "1 unexpected: x"),
    "another shape": (with_array("module.pre_feature.1.bias", np.zeros(3)), r"pre_feature.1.bias has shape \(3,\)"),
    "a flat kernel": (with_array("module.pre_feature.0.weight", np.zeros(3)), r"kernels have shapes .*\(3,\)"),
    "NaN": (with_array("module.pre_feature.1.running_var", np.full(64, np.nan)), "running_var is not finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(official, tmp_path, case):
    change, message = REFUSED[case]
    file = save(tmp_path / "a.safetensors", change(official[1]))
    with pytest.raises(UserError, match=message):
        run_command(["import", file, "--workdir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_refused(official, tiny_run, tmp_path):
    file = save(tmp_path / "a.safetensors", official[1])
    with pytest.raises(UserError, match=r"--workdir is .*: that folder holds a run, so give another one"):
        run_command(["import", file, "--workdir", str(tiny_run)])


def test_files_of_something_else_are_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no tensors")
    for file, message in (("a.safetensors", "cannot be read"), ("b.safetensors", "There is no file")):
        with pytest.raises(UserError, match=message):
            run_command(["import", str(tmp_path / file), "--workdir", str(tmp_path / "run")])


def test_without_torch_its_files_are_refused_with_the_remedy(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pt").touch()
    for command in (
        ["export", str(tiny_run), "--format", "torch"],
        ["import", str(tmp_path / "a.pt"), "--workdir", "x"],
    ):
        with pytest.raises(UserError, match=r'need PyTorch: pip install "empssl_jax\[torch\]", or use a .safetensors'):
            run_command(command)


def test_a_torch_file_cannot_run_code(tmp_path):
    torch = pytest.importorskip("torch", reason="pip install -e '.[torch]'")

    class Bad:
        def __reduce__(self):
            return (tmp_path / "run_by_the_file").touch, ()

    torch.save({"x": Bad()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="a state dictionary and nothing else"):
        run_command(["import", str(tmp_path / "a.pt"), "--workdir", str(tmp_path / "run")])
    assert not (tmp_path / "run_by_the_file").exists()


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_torchvision_computes_our_features(backbone, stem):
    torch = pytest.importorskip("torch", reason="pip install -e '.[torch]'")
    torchvision = pytest.importorskip("torchvision", reason="pip install -e '.[bench]'")
    config = ModelConfig(backbone=backbone, stem=stem, hidden_dim=2, projection_dim=2, precision="float32")
    state = models.init_encoder(config, KEY)
    drawn = iter(jax.random.split(KEY, 1000))
    change = jax.tree.map(
        lambda a: 1 + 0.3 * jax.random.uniform(next(drawn), a.shape), (state.params, state.batch_stats)
    )
    params, batch_stats = jax.tree.map(lambda a, b: (a + 0.1 * (a == 0)) * b, tuple(state), change)
    resnet = getattr(torchvision.models, backbone)()
    resnet.fc = torch.nn.Identity()
    if stem == "cifar":
        resnet.conv1, resnet.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    arrays = names_module.to_torch(models.EncoderState(params, batch_stats), config, 0)
    arrays = {name: torch.tensor(array) for name, array in arrays.items() if name.startswith("backbone.")}
    resnet.load_state_dict({name.removeprefix("backbone."): array for name, array in arrays.items()})
    patches = np.asarray(jax.random.uniform(KEY, (3, 48, 48, 3), minval=-1, maxval=1))
    with torch.no_grad():
        theirs = resnet.eval()(torch.from_numpy(np.moveaxis(patches, -1, 1).copy())).numpy()
    encoder = nnx.merge(models.encoder_graph(config), params, batch_stats)
    encoder.eval()
    assert relative_error(jax.jit(lambda x: encoder.backbone(x))(patches), theirs) < 1e-3
