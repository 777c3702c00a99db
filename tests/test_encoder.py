"""The encoder equals the PyTorch reference and has the expected properties."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_state, leaf, torch_names
from flax import nnx

from empssl_jax.config import ModelConfig
from empssl_jax.method import encoder as models
from empssl_jax.method import losses
from empssl_jax.method.batch_norm import BatchNorm
from empssl_jax.method.resnet import BACKBONES, Convolution, normalised

KEY = jax.random.key(0)
CONFIG = ModelConfig(hidden_dim=64, projection_dim=32, precision="float32")


@pytest.fixture(scope="module")
def reference(golden):
    """The golden numbers, the map from their names to our paths, and the graph and state of an encoder."""
    numbers = golden("resnet18")
    paths = torch_names(numbers["names"])
    state = golden_state(models.init_encoder(CONFIG, KEY), numbers["names"], int(numbers["weight_seed"]))
    return numbers, paths, models.encoder_graph(CONFIG), state


@pytest.fixture(scope="module")
def trained_once(reference):
    """Loss, outputs, running statistics and gradients of one pass in training mode."""
    numbers, _, graph, state = reference

    @jax.jit
    def run(params, batch_stats, images):
        def loss_fn(params):
            encoder = nnx.merge(graph, params, batch_stats)
            encoder.train()
            embeddings, projections = encoder(images)
            # The rows are 3 images with 4 consecutive patches each.
            by_patch = jnp.swapaxes(losses.normalise(projections).reshape(3, 4, -1), 0, 1)
            loss = losses.emp_ssl_loss(by_patch, 200.0, 0.2)
            return loss.total, (embeddings, projections, models.encoder_state(encoder).batch_stats)

        return jax.value_and_grad(loss_fn, has_aux=True)(params)

    return run(*state, jnp.asarray(numbers["images"]))


@functools.partial(jax.jit, static_argnums=0)
def evaluated(graph, state, images):
    """Embeddings and projections in evaluation mode."""
    encoder = nnx.merge(graph, *state)
    encoder.eval()
    return encoder(images)


def relative_error(ours, theirs) -> float:
    return float(np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs)))


def test_golden_train_outputs(reference, trained_once):
    numbers = reference[0]
    (_, (embeddings, projections, _)), _ = trained_once
    assert relative_error(embeddings, numbers["train_embeddings"]) < 1e-3
    assert relative_error(projections, numbers["train_projections"]) < 1e-3


def test_golden_loss(reference, trained_once):
    (total, _), _ = trained_once
    assert float(total) == pytest.approx(float(reference[0]["loss"]), rel=1e-4)


def test_golden_gradient_norms(reference, trained_once):
    numbers, paths, *_ = reference
    _, gradients = trained_once
    checked = 0
    for name, path in paths.items():
        if f"gradnorm/{name}" in numbers:
            norm = np.linalg.norm(np.ravel(leaf(gradients, path)))
            assert norm == pytest.approx(float(numbers[f"gradnorm/{name}"]), rel=5e-3), name
            checked += 1
    assert checked == len(jax.tree.leaves(gradients))


def test_golden_running_statistics(reference, trained_once):
    numbers, paths, *_ = reference
    (_, (_, _, batch_stats)), _ = trained_once
    names = [name for name in paths if "running" in name]
    assert len(names) == len(jax.tree.leaves(batch_stats))
    for name in names:
        assert relative_error(leaf(batch_stats, paths[name]), numbers[f"after/{name}"]) < 1e-3, name


def test_golden_eval_outputs(reference, trained_once):
    numbers, _, graph, state = reference
    (_, (_, _, batch_stats)), _ = trained_once
    embeddings, projections = evaluated(graph, (state.params, batch_stats), numbers["images"])
    assert relative_error(embeddings, numbers["eval_embeddings"]) < 1e-3
    assert relative_error(projections, numbers["eval_projections"]) < 1e-3


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_golden_backbones(golden, backbone, stem):
    """Compares features in training mode, a running statistic after it, and features in evaluation mode."""
    numbers = golden("backbones")
    expected = {key.split("/")[1]: value for key, value in numbers.items() if key.startswith(f"{backbone}-{stem}/")}
    config = ModelConfig(backbone=backbone, stem=stem, hidden_dim=1, projection_dim=2, precision="float32")
    state = models.init_encoder(config, KEY)
    names = [name for name in expected["names"] if not name.endswith("num_batches_tracked")]
    assert len(names) == len(jax.tree.leaves((state.params["backbone"], state.batch_stats["backbone"])))
    state = golden_state(state, names, int(numbers["backbone_weight_seed"]))

    @jax.jit
    def run(state, images):
        encoder = nnx.merge(models.encoder_graph(config), *state)
        encoder.train()
        train_features = encoder.backbone(images)
        encoder.eval()
        return train_features, encoder.backbone.norm.var[...], encoder.backbone(images)

    train_features, variance, eval_features = run(state, jnp.asarray(expected["images"]))
    assert relative_error(train_features, expected["train_features"]) < 1e-3
    assert relative_error(variance, expected["after_bn1_running_var"]) < 1e-3
    assert relative_error(eval_features, expected["eval_features"]) < 1e-3


@pytest.mark.long
def test_remat_changes_no_gradient():
    config = ModelConfig(backbone="resnet50", width=2, hidden_dim=4, projection_dim=2, precision="float32")
    state = models.init_encoder(config, KEY)
    patches = jax.random.uniform(KEY, (3, 8, 8, 3), minval=-1, maxval=1)

    def gradients(remat):
        def loss(params):
            encoder = nnx.merge(models.encoder_graph(config, remat=remat), params, state.batch_stats)
            encoder.train()
            return jnp.sum(encoder(patches)[1] ** 3)

        return jax.jit(jax.grad(loss))(state.params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradients(True), gradients(False))


@pytest.mark.parametrize(("side", "stride"), [(2, 1), (4, 1), (4, 2), (8, 2)])
def test_convolutions_equal_the_general_one(side, stride):
    """The output and both gradients are equal."""
    x, kernel = jax.random.normal(jax.random.key(1), (7, side, side, 6)), jax.random.normal(KEY, (3, 3, 6, 5))

    def ours(x, kernel):
        convolution = Convolution(6, 5, 3, stride, jnp.float32)
        convolution.kernel[...] = kernel
        return convolution(x)

    def general(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=layout)

    (y, pull_back), (expected, general_pull_back) = jax.vjp(ours, x, kernel), jax.vjp(general, x, kernel)
    assert y.shape[1] == side // stride
    g = jax.random.normal(jax.random.key(2), y.shape)
    for mine, theirs in zip((y, *pull_back(g)), (expected, *general_pull_back(g)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("side", "stride"), [(8, 2), (2, 1)])
def test_with_running_statistics_a_convolution_includes_its_norm(side, stride):
    """The output is that of the textbook formula, in float64, after the convolution."""
    convolution, norm = Convolution(6, 5, 3, stride, jnp.float32), BatchNorm(5, None)
    draws = np.random.default_rng(0)
    convolution.kernel[...] = jnp.asarray(draws.normal(size=(3, 3, 6, 5)), jnp.float32)
    mean, scale, bias = draws.normal(size=(3, 5))
    var = draws.uniform(0.1, 4, 5)
    for array, values in zip((norm.mean, norm.var, norm.scale, norm.bias), (mean, var, scale, bias), strict=True):
        array[...] = jnp.asarray(values, jnp.float32)
    norm.eval()
    x = jax.random.normal(KEY, (7, side, side, 6))
    expected = (np.asarray(convolution(x), np.float64) - mean) / np.sqrt(var + 1e-5) * scale + bias
    np.testing.assert_allclose(normalised(x, convolution, norm), expected, rtol=1e-5, atol=1e-5)


def test_the_stem_starts_as_in_the_references():
    """They replace torchvision's first convolution, normal by fan-out, by one with torch's default."""

    def kernel(stem):
        config = ModelConfig(stem=stem, precision="float32")
        return models.init_encoder(config, KEY).params["backbone"]["stem"]["kernel"]

    assert float(jnp.std(kernel("cifar"))) == pytest.approx((3 * 3 * 9) ** -0.5, rel=0.03)
    assert float(jnp.max(jnp.abs(kernel("cifar")))) == pytest.approx((3 * 9) ** -0.5, rel=2e-3)
    assert float(jnp.std(kernel("imagenet"))) == pytest.approx(np.sqrt(2 / (49 * 64)), rel=0.03)
    assert float(jnp.max(jnp.abs(kernel("imagenet")))) > 3 * np.sqrt(2 / (49 * 64))


def test_parameters_start_as_in_torch():
    """Convolutions are normal by fan-out. All other parameters are uniform within 1 / sqrt(fan-in)."""
    params = models.init_encoder(ModelConfig(precision="float32"), KEY).params
    kernel = params["backbone"]["blocks"][7]["conv1"]["kernel"]
    assert float(jnp.std(kernel)) == pytest.approx(np.sqrt(2 / (9 * 512)), rel=0.01)
    assert float(jnp.max(jnp.abs(kernel))) > 4 * np.sqrt(2 / (9 * 512))
    for name, fan_in in [("hidden", 512), ("projector", 4096), ("projection", 4096)]:
        assert float(jnp.max(jnp.abs(params[name]["kernel"]))) == pytest.approx(fan_in**-0.5, rel=1e-3)
        assert float(jnp.std(params[name]["kernel"])) == pytest.approx((3 * fan_in) ** -0.5, rel=0.01)
    assert (
        -(4096**-0.5) <= float(jnp.min(params["projection"]["bias"])) < 0 < float(jnp.max(params["projection"]["bias"]))
    )


def test_the_paper_s_encoder_has_the_reference_s_size():
    """ResNet-18 without its classifier has 11.17 million parameters. The head adds its layers."""
    shapes = jax.eval_shape(lambda: models.init_encoder(ModelConfig(precision="float32"), KEY))
    count = sum(np.prod(x.shape) for x in jax.tree.leaves(shapes.params))
    head = 512 * 4096 + 2 * 4096 + 4096 * 4096 + 2 * 4096 + 4096 * 1024 + 1024
    assert count == 11_168_832 + head


def test_bfloat16_is_close_to_float32_and_leaves_float32_statistics():
    config = ModelConfig(width=4, hidden_dim=32, projection_dim=16, precision="float32")
    state, images = models.init_encoder(config, KEY), jax.random.uniform(KEY, (16, 16, 16, 3), minval=-1, maxval=1)

    @functools.partial(jax.jit, static_argnums=0)
    def run(config):
        encoder = nnx.merge(models.encoder_graph(config), *state)
        encoder.train()
        return encoder(images)[0], models.encoder_state(encoder).batch_stats

    embeddings, statistics = {}, {}
    for precision in ("float32", "bfloat16"):
        embeddings[precision], statistics[precision] = run(dataclasses.replace(config, precision=precision))
    assert {x.dtype for x in jax.tree.leaves((embeddings, statistics))} == {jnp.dtype(jnp.float32)}
    error = jnp.linalg.norm(embeddings["bfloat16"] - embeddings["float32"]) / jnp.linalg.norm(embeddings["float32"])
    assert 1e-4 < float(error) < 0.1
