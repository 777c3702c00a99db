"""The encoder against the PyTorch reference, and what is true of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import from_torch_layout, leaf, to_torch_layout, torch_names, torch_weights
from flax import nnx

from empssl_jax import losses, models
from empssl_jax.config import ModelConfig

CONFIG = ModelConfig(hidden_dim=64, projection_dim=32, precision="float32")


@pytest.fixture(scope="module")
def reference(golden):
    """The golden numbers, the names of its arrays as paths of ours, and an encoder with its weights."""
    numbers = golden("resnet18")
    paths = torch_names(numbers["names"])
    graph = models.encoder_graph(CONFIG)
    state = jax.tree.map(np.array, models.init_encoder(CONFIG, jax.random.key(0)))

    def tree_of(name):
        return state.batch_stats if "running" in name else state.params

    shapes = {name: to_torch_layout(leaf(tree_of(name), path)).shape for name, path in paths.items()}
    weights = torch_weights(numbers["names"], int(numbers["weight_seed"]), shapes)
    for name, path in paths.items():
        leaf(tree_of(name), path[:-1])[path[-1]] = jnp.asarray(from_torch_layout(weights[name]), jnp.float32)
    return numbers, paths, graph, jax.tree.map(jnp.asarray, state)


@pytest.fixture(scope="module")
def trained_once(reference):
    """One pass in training mode: gradients, loss, outputs and running statistics after it."""
    numbers, _, graph, state = reference

    @jax.jit
    def run(params, batch_stats, images):
        def loss_fn(params):
            encoder = nnx.merge(graph, params, batch_stats)
            encoder.train()
            embeddings, projections = encoder(images)
            # The rows are 3 images of 4 patches, an image's patches side by side.
            by_patch = jnp.swapaxes(losses.normalise(projections).reshape(3, 4, -1), 0, 1)
            loss = losses.emp_ssl_loss(by_patch, 200.0, 0.2)
            return loss.total, (embeddings, projections, models.encoder_state(encoder).batch_stats)

        return jax.value_and_grad(loss_fn, has_aux=True)(params)

    return run(*state, jnp.asarray(numbers["images"]))


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
    encoder = nnx.merge(graph, state.params, batch_stats)
    encoder.eval()
    embeddings, projections = encoder(jnp.asarray(numbers["images"]))
    assert relative_error(embeddings, numbers["eval_embeddings"]) < 1e-3
    assert relative_error(projections, numbers["eval_projections"]) < 1e-3
