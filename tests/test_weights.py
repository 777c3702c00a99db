"""Encoders to PyTorch files and back: the authors' encoder, exact round trips, and errors that name the arrays."""

import dataclasses
import functools
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
from empssl_jax.config import ModelConfig, RunConfig
from empssl_jax.config.command_options import ExportOptions, ImportOptions
from empssl_jax.config.errors import UserError
from empssl_jax.inference import torch_names as names_module
from empssl_jax.inference.import_weights import IMAGENET, read_run
from empssl_jax.method import encoder as models
from empssl_jax.method.hyperparameters import Hyperparameters
from empssl_jax.method.random_keys import parameters_key
from empssl_jax.method.resnet import BACKBONES
from empssl_jax.run_folder import results, step_files
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
    assert ours.config == dataclasses.replace(theirs.config, run=RunConfig(workdir=str(workdir)))
    # Training starts from the imported encoder.
    hyperparameters = Hyperparameters.of(ours.config.training, 2)
    with Checkpoints(workdir) as store:
        step, state = training._initial_state(ours.config, hyperparameters, store, device_mesh())
    assert step == int(state.step) == 0
    assert_equal(state.encoder, theirs.state)
    other = dataclasses.replace(ours.config, model=dataclasses.replace(ours.config.model, width=8))
    with pytest.raises(UserError, match=r"holds another run: --width 8 \(was 4\)"):
        training._check_workdir(workdir, other)


@pytest.mark.parametrize(
    ("kind", "name", "other"),
    [
        ("safetensors", "enc.pt", "torch"),
        ("safetensors", "enc.PTH", "torch"),
        ("safetensors", "enc.onnx", "onnx"),
        ("torch", "enc.safetensors", "safetensors"),
        ("onnx", "enc.pt", "torch"),
    ],
)
def test_a_file_does_not_have_the_suffix_of_another_format(kind, name, other):
    message = f"^--output is '{name}': that suffix belongs to --format {other}, so give that format or another name"
    with pytest.raises(UserError, match=message):
        ExportOptions("runs/x", kind, output=name)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("torch", "a.pt"), ("torch", "a.pth"), ("onnx", "a.onnx"), ("safetensors", "a.safetensors"), ("torch", "a.bin")],
)
def test_a_file_has_a_suffix_of_its_format_or_an_unknown_one(kind, name):
    assert ExportOptions("runs/x", kind, output=name).output == name


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
    config = json.loads(metadata["config"])
    assert config["patches"]["patch_size"] == 16
    assert "run" not in config  # it names folders
    assert (metadata["embedding"], metadata["features"]) == (
        "2 random patches, hidden",
        "relu(pre_feature(mean of layer4)); patches are averaged, cells concatenated",
    )


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
    assert encoder.config.model == dataclasses.replace(model, **IMAGENET)
    assert_equal(encoder.state, begun._replace(params=begun.params | {"backbone": other.params["backbone"]}))


RESNET50 = ModelConfig("resnet50", "imagenet", 2, 3, 2, "float32")
RESNET18 = dataclasses.replace(RESNET50, backbone="resnet18")
SMALL_HEADS = "from empssl_jax.config import *\nconfig = Config(model=ModelConfig(hidden_dim=3, projection_dim=2))\n"


def resnet_file(path, wrap="", others=None, config=RESNET50):
    """Saves a small ResNet and its classifier, with torchvision's names after a prefix."""
    arrays = names_module.to_torch(models.init_encoder(config, KEY), config, 0)
    resnet = {name.removeprefix("backbone."): a for name, a in arrays.items() if name.startswith("backbone.")}
    resnet |= {"fc.weight": np.eye(2), "fc.bias": np.zeros(2)}
    return save(path, {wrap + name: array for name, array in resnet.items()} | (others or {}))


def read(file, *options):
    return read_run(ImportOptions(str(file), "run", *options))


WRAPPERS = {
    "module.": "module.",
    "encoder.": "encoder.",
    "backbone.": "",
    "model.backbone._orig_mod.": "_orig_mod., model.",
    "net.module.resnet.": "module., net.resnet.",
}


def test_a_resnet_alone_has_its_own_sizes_and_any_wrapper(tmp_path):
    """The config file has another backbone, stem and width; only the heads' dimensions come from it."""
    (tmp_path / "config.py").write_text(SMALL_HEADS)
    plain = read(resnet_file(tmp_path / "a.safetensors", ""), str(tmp_path / "config.py"), True)
    assert plain.config.model == dataclasses.replace(RESNET50, **IMAGENET)
    assert not [note for note in plain.notes if "prefix" in note]
    for wrap, removed in WRAPPERS.items():
        found = read(resnet_file(tmp_path / "b.safetensors", wrap), str(tmp_path / "config.py"), True)
        assert_equal(found.encoder, plain.encoder)
        assert [note for note in found.notes if "prefix" in note] == [f"prefixes removed from the names: {removed}"] * (
            removed != ""
        )


def test_what_lies_outside_a_resnet_is_dropped_by_name(tmp_path):
    (tmp_path / "config.py").write_text(SMALL_HEADS)
    file = resnet_file(tmp_path / "a.safetensors", "encoder_q.", {"queue": np.eye(2), "encoder_q.pool.x": np.eye(2)})
    with pytest.raises(UserError, match=r"a resnet50 alone: 0 missing; 1 unexpected: pool\.x; give a ResNet"):
        read(file, str(tmp_path / "config.py"), True)
    file = resnet_file(tmp_path / "a.safetensors", "encoder_q.", {"queue": np.eye(2)})
    found = read(file, str(tmp_path / "config.py"), True)
    assert found.notes[-1] == "arrays without a place in the encoder: 3 dropped: fc.bias, fc.weight, queue"


@pytest.mark.parametrize("wrap", ["module.", "model.", "_orig_mod.module.", "module.net."])
def test_an_encoder_has_any_wrapper(official, tmp_path, wrap):
    bare = {name.removeprefix("module."): array for name, array in official[1].items()}
    plain = read(save(tmp_path / "a.safetensors", bare))
    found = read(save(tmp_path / "b.safetensors", {wrap + name: array for name, array in bare.items()}))
    assert_equal(found.encoder, plain.encoder)
    assert found.config == plain.config
    assert plain.config.model == OFFICIAL


def test_a_file_with_several_resnets_is_refused(tmp_path):
    other = {"encoder_k.layer1.0.conv1.weight": np.zeros((2, 2, 1, 1))}
    with pytest.raises(UserError, match=r"2 ResNets, with prefixes such as 'encoder_k\.', 'encoder_q\.': give"):
        read(resnet_file(tmp_path / "a.safetensors", "encoder_q.", other), None, True)


def test_an_imported_run_has_none_of_the_exporter_s_folders(official, tmp_path):
    """Files of earlier versions name them."""
    run = {"workdir": "/theirs", "data_dir": "/theirs", "cache_dir": "/theirs", "probe_every": 7}
    metadata = {"config": json.dumps({"run": run, "training": {"seed": 5}})}
    config = read(save(tmp_path / "a.safetensors", official[1], metadata)).config
    assert (config.run, config.training.seed) == (RunConfig(workdir="run"), 5)


def without(name):
    return lambda arrays: {other: array for other, array in arrays.items() if other != name}


def with_array(name, array):
    return lambda arrays: arrays | {name: array}


def test_the_input_is_normalised_as_the_weights_were_trained(tmp_path):
    """Known without PyTorch: the stem's outputs, also at the border, and the features of normalised pixels."""
    (tmp_path / "config.py").write_text(SMALL_HEADS)
    file = resnet_file(tmp_path / "a.safetensors", config=RESNET18)
    found = read(file, str(tmp_path / "config.py"), True)
    pixels = np.random.RandomState(0).randint(0, 256, (2, 16, 16, 3))
    theirs = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    patches = jnp.asarray(pixels / 127.5 - 1, jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def stem_and_features(config, state, patches):
        encoder = nnx.merge(models.encoder_graph(config), *state)
        encoder.eval()
        return encoder.backbone.stem(encoder.backbone.normalise_channels(patches)), encoder.backbone(patches)

    stem, features = stem_and_features(found.config.model, found.encoder, patches)
    kernel = np.float64(found.encoder.params["backbone"]["stem"]["kernel"])
    padded = np.pad(theirs, ((0, 0), (3, 3), (3, 3), (0, 0)))
    for row, column in ((0, 0), (3, 4), (7, 7)):
        window = padded[:, 2 * row : 2 * row + 7, 2 * column : 2 * column + 7]
        np.testing.assert_allclose(stem[:, row, column], np.tensordot(window, kernel, 3), rtol=1e-4, atol=1e-5)
    _, expected = stem_and_features(RESNET18, found.encoder, theirs.astype(np.float32))  # normalises nothing more
    assert relative_error(features, expected) < 1e-5


def test_the_normalisation_can_be_given_and_survives_export_and_import(tiny_run, tmp_path):
    """A file's own normalisation is used unless another is given; arrays and config stay as they are."""
    run_command(["export", str(tiny_run), "--output", str(tmp_path / "a.safetensors")])
    channels = ["--input-mean", "0.1", "0.2", "0.3", "--input-std", "0.25", "0.5", "1"]
    run_command(["import", str(tmp_path / "a.safetensors"), "--workdir", str(tmp_path / "b"), *channels])
    run_command(["export", str(tmp_path / "b"), "--output", str(tmp_path / "b.safetensors")])
    with safetensors.safe_open(tmp_path / "b.safetensors", framework="numpy") as file:
        assert file.metadata()["input"].endswith("(pixels / 255 - mean) / std, mean 0.1 0.2 0.3, std 0.25 0.5 1.0")
    before, after = read(tmp_path / "a.safetensors"), read(tmp_path / "b.safetensors")
    assert_equal(after.encoder, before.encoder)
    model = before.config.model
    assert (model.input_mean, model.input_std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert after.config.model == dataclasses.replace(model, input_mean=(0.1, 0.2, 0.3), input_std=(0.25, 0.5, 1.0))
    # As embed's pipeline sees it: another normalisation, other embeddings.
    images = np.random.RandomState(0).randint(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    assert relative_error(empssl_jax.load(tmp_path / "b").embed(images), empssl_jax.load(tiny_run).embed(images)) > 0.1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (((0.5, 0.5, 0.5), None), "--input-mean is .*: give --input-mean and --input-std together"),
        ((None, (0.5, 0.5, 0.5)), "--input-std is .*: give --input-mean and --input-std together"),
        (((123.7, 116.3, 103.5), (1.0, 1.0, 1.0)), "--input-mean is .*: give a number from 0 to 1 for each of red"),
        (((0.5, 0.5, 0.5), (0.5, 0.0, 0.5)), "--input-std is .*: give a number from 0.001 to 1 for each of red"),
    ],
)
def test_a_wrong_normalisation_is_refused(official, tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        read(save(tmp_path / "a.safetensors", official[1]), None, False, *given)


WRONG_METADATA = {
    **{
        f"image_size {text!r}"[:30]: ({"image_size": text}, "`image_size` in .*a whole number from 1 to 65536")
        for text in ("224x224", "-3", "0", "65537", "", "3.0", " 32", "9" * 5000, "²", "None")
    },
    "no JSON": ({"config": "{"}, "`config` in .* is not a config"),
    "JSON of something else": ({"config": "[1]"}, "`config` in .* is not a config"),
    "an unknown option": ({"config": '{"model": {"x": 1}}'}, "`config` in .* is not a config"),
    "a wrong type": ({"config": '{"model": {"width": "8"}}'}, "`config` in .* wrong value: --width is '8'"),
    "a wrong range": ({"config": '{"data": {"image_size": -3}}'}, "`config` in .* wrong value: --image-size is -3"),
    "two channels": ({"config": '{"model": {"input_std": [1, 1]}}'}, "`config` in .* wrong value: --input-std is"),
    "words": ({"input_mean": "a b c", "input_std": "1 1 1"}, "metadata of .* wrong value: --input-mean is"),
    "a mean alone": ({"input_mean": "0 0 0"}, "metadata of .* wrong value: --input-std is"),
    "NaN": ({"input_mean": "0 0 nan", "input_std": "1 1 1"}, "metadata of .* wrong value: --input-mean is"),
}


@pytest.mark.parametrize("case", WRONG_METADATA)
def test_wrong_metadata_are_refused_before_anything_is_written(official, tmp_path, case):
    metadata, message = WRONG_METADATA[case]
    file = save(tmp_path / "a.safetensors", official[1], metadata)
    with pytest.raises(UserError, match=message):
        run_command(["import", file, "--workdir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def with_header(change):
    """A small file whose header, JSON, is changed."""
    content = safetensors.numpy.save({"x": np.ones(3, np.float32)}, {"image_size": "32"})
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    changed = change(header).encode()
    return len(changed).to_bytes(8, "little") + changed + content[-12:]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        with_header(lambda header: "{"),
        with_header(lambda header: "[]"),
        with_header(lambda header: json.dumps(header | {"x": 3})),
        *(
            with_header(lambda header, change=change: json.dumps(header | {"x": header["x"] | change}))
            for change in (
                {"dtype": "F33"}, {"dtype": 3}, {"dtype": "F64"}, {"shape": [-3]}, {"shape": [4]}, {"shape": "3"},
                {"shape": [2**62, 8]}, {"data_offsets": [0, 13]}, {"data_offsets": [12, 0]}, {"data_offsets": [0]},
            )
        ),
        *(
            with_header(lambda header, metadata=metadata: json.dumps(header | {"__metadata__": metadata}))
            for metadata in (3, [], {"image_size": 32}, {"image_size": None})
        ),
    ],
)  # fmt: skip
def test_damaged_headers_are_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.safetensors cannot be read"):
        run_command(["import", str(tmp_path / "a.safetensors"), "--workdir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


REFUSED = {
    "a missing array": (without("module.backbone.layer2.0.bn1.weight"), "1 missing: backbone.layer2.0.bn1.weight; 0"),
    "one too many": (with_array("module.fc.weight", np.eye(2)), "0 missing; 1 unexpected: fc.weight"),
    "no encoder": (lambda arrays: {"x": np.eye(2)}, "1 unexpected: x"),
    "another shape": (with_array("module.pre_feature.1.bias", np.zeros(3)), r"pre_feature.1.bias has shape \(3,\)"),
    "a flat kernel": (with_array("module.pre_feature.0.weight", np.zeros(3)), r"kernels have shapes .*\(3,\)"),
    "whole numbers": (
        with_array("module.projection.3.bias", np.ones(32, np.int8)),
        "projection.3.bias has type int8 instead of floating point: give a file that is not quantised",
    ),
    "NaN": (with_array("module.pre_feature.1.running_var", np.full(64, np.nan)), "running_var is not finite"),
    "beyond float32": (with_array("module.projection.3.bias", np.full(32, 1e300)), "projection.3.bias is not finite"),
    "a mean that overflows": (
        lambda arrays: (
            arrays
            | {"module.pre_feature.1.running_mean": np.full(64, 3e38), "module.pre_feature.0.bias": np.full(64, -3e38)}
        ),
        "running_mean is not finite",
    ),
    "negative variances": (with_array("module.backbone.bn1.running_var", -np.ones(64)), "has negative variances"),
    "too wide": (
        with_array("module.backbone.conv1.weight", np.zeros((1001, 3, 3, 3))),
        "not supported: --width is 1001",
    ),
    "no channels": (with_array("module.backbone.conv1.weight", np.zeros((0, 3, 3, 3))), "not supported: --width is 0"),
    "a 5x5 stem": (with_array("module.backbone.conv1.weight", np.zeros((64, 3, 5, 5))), r"conv1.weight has shape"),
    "gray": (with_array("module.backbone.conv1.weight", np.zeros((64, 1, 3, 3))), r"conv1.weight has shape"),
    "the same twice": (with_array("pre_feature.1.bias", np.zeros(64)), "have the same name apart from wrappers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(official, tmp_path, case):
    change, message = REFUSED[case]
    file = save(tmp_path / "a.safetensors", change(official[1]))
    with pytest.raises(UserError, match=message):
        run_command(["import", file, "--workdir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "F4"])
def test_safetensors_of_at_most_8_bits_are_refused(tmp_path, kind):
    """The file is written by hand: the length of its header, the header, and 16 bytes of numbers."""
    shape = [32] if kind == "F4" else [16]
    header = json.dumps({"conv1.weight": {"dtype": kind, "shape": shape, "data_offsets": [0, 16]}}).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    message = f"a.safetensors has arrays of type {kind}, such as 'conv1.weight': give a file that is not quantised"
    with pytest.raises(UserError, match=message):
        read(file)


def test_a_folder_with_a_run_is_refused(official, tiny_run, tmp_path):
    file = save(tmp_path / "a.safetensors", official[1])
    with pytest.raises(UserError, match=r"--workdir is .*: that folder holds a run, so give another one"):
        run_command(["import", file, "--workdir", str(tiny_run)])


def test_a_foreign_config_in_a_file_gives_way_to_a_config_file(official, tmp_path):
    (tmp_path / "config.py").write_text(SMALL_HEADS)
    file = save(tmp_path / "a.safetensors", official[1], {"config": "configs/theirs.yaml"})
    with pytest.raises(UserError, match=r"^`config` in .* is not a config of this .*: give --config FILE\.py\.$"):
        read(file)
    assert read(file, str(tmp_path / "config.py")).config.model == OFFICIAL


def test_an_imported_run_has_no_results_or_metrics_of_a_run_that_left_no_checkpoint(official, tmp_path):
    workdir, file = tmp_path / "run", save(tmp_path / "a.safetensors", official[1])
    workdir.mkdir()
    results.add_results(workdir, {"kNN": {"top1": 0.5, "top5": 0.9}})
    names = ("metrics.jsonl", "probe.jsonl", "timing.jsonl")
    for name in names:
        (workdir / name).write_text('{"step": 0, "seconds": 1.0}\n')
    run_command(["import", file, "--workdir", str(workdir)])
    assert results.load_results(workdir) == {}
    assert [step_files.read_steps(workdir / name) for name in names] == [[], [], []]


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
        with pytest.raises(UserError, match=r'need PyTorch: pip install -e "\.\[torch\]", or use a .safetensors'):
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


def test_torch_files_may_nest_the_state_dictionary(official, tmp_path):
    torch = pytest.importorskip("torch", reason="pip install -e '.[torch]'")
    tensors = {str(name): torch.tensor(array) for name, array in official[1].items()}
    plain = read(save(tmp_path / "a.safetensors", official[1]))
    ema = {name: tensor + 1 for name, tensor in tensors.items()}
    for content in (
        tensors,
        {"state_dict": tensors, "epoch": 3},
        *({"state_dict": tensors, "metadata": foreign} for foreign in (None, [1], "text", 3)),
        {"model": {"net": tensors}, "optimizer": {"state": {0: {"momentum": torch.zeros(3)}}, "lr": 0.1}},
        {"state_dict": tensors, "ema": ema},
        {name: torch.nn.Parameter(tensor.double()) if tensor.ndim else tensor for name, tensor in tensors.items()},
    ):
        torch.save(content, tmp_path / "a.pt")
        assert_equal(read(tmp_path / "a.pt").encoder, plain.encoder)
    for content, message in (
        ({"model": tensors, "ema": ema}, "contains 2 ResNets, for example in 'model', 'ema': save one"),
        (tensors | {"epoch": 3}, "'epoch' is no tensor"),
        (tensors | {"x": torch.zeros(3, dtype=torch.complex64)}, "x is complex"),
        (tensors | {"x": torch.zeros(3, dtype=torch.float8_e5m2)}, "arrays of type torch.float8_e5m2, such as 'x'"),
        (torch.zeros(3), "contains a Tensor"),
        ({"state_dict": tensors, "metadata": {"image_size": -3}}, "`image_size` in .* is '-3'"),
    ):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(UserError, match=message):
            run_command(["import", str(tmp_path / "a.pt"), "--workdir", str(tmp_path / "run")])
        assert not (tmp_path / "run").exists()


def test_an_imported_resnet_has_the_features_of_torchvision_s_own_input(tmp_path):
    """From pixels: torchvision's preset normalisation and forward pass, and the imported run's."""
    torch = pytest.importorskip("torch", reason="pip install -e '.[torch]'")
    torchvision = pytest.importorskip("torchvision", reason="pip install -e '.[bench]'")
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18()
    pixels = torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8)
    weights_enum = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    scaled = torchvision.transforms.functional.normalize(pixels / 255, weights_enum.mean, weights_enum.std)
    resnet.train()(scaled)  # gives BatchNorm statistics
    file = save(tmp_path / "a.safetensors", {name: value.numpy() for name, value in resnet.state_dict().items()})
    (tmp_path / "config.py").write_text(SMALL_HEADS)
    found = read(file, str(tmp_path / "config.py"), True)
    resnet.fc = torch.nn.Identity()
    with torch.no_grad():
        theirs = resnet.eval()(scaled).numpy()
    patches = np.moveaxis(pixels.numpy(), 1, -1).astype(np.float32) / 127.5 - 1

    @jax.jit
    def features(state, patches):
        encoder = nnx.merge(models.encoder_graph(found.config.model), *state)
        encoder.eval()
        return encoder.backbone(patches)

    assert relative_error(features(found.encoder, patches), theirs) < 1e-4


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
