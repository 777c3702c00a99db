"""NaN and infinities in an image, a parameter or a gradient: the run stops at that step and keeps a good checkpoint."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from empssl_jax import training
from empssl_jax.config.config_files import parse_train_options
from empssl_jax.config.errors import DivergenceError
from empssl_jax.data.batches import shuffled_batches
from empssl_jax.data.datasets import load_datasets
from empssl_jax.method import train_step
from empssl_jax.method.hyperparameters import Hyperparameters
from empssl_jax.method.train_step import create_state
from empssl_jax.run_folder.checkpoints import Checkpoints
from empssl_jax.runtime.devices import device_mesh, replicated
from tests.test_end_to_end import DIGITS, REPOSITORY

STEP = 7
pytestmark = pytest.mark.long


def in_an_image(patch, config, value):
    """Puts the value into the patches of one image of the step."""
    dataset = load_datasets(config).train
    batch = next(shuffled_batches(dataset, config.training.batch_size, config.training.seed, STEP, STEP + 1))
    original = train_step.multi_patch

    def multi_patch(*args, indices, **options):
        patches = original(*args, indices=indices, **options)
        # Epochs begin at steps 0, 5 and 10. The first epoch has the image too, without damage.
        epochs = args[0] == train_step.training_patches_key(config.training.seed, STEP // 5)
        hit = (indices == batch.indices[3]) & epochs
        return patches.at[:, 2, 5, 5, 1].set(jnp.where(hit, value, patches[:, 2, 5, 5, 1]))

    patch.setattr(train_step, "multi_patch", multi_patch)


def in_a_parameter(patch, config, value):
    """Puts the value into one weight before the step."""
    original = training.make_train_step

    def make_train_step(*args):
        step = original(*args)

        def damaged_step(hyperparameters, state, batch):
            if int(state.step) == STEP:
                damaged = state.encoder.params | {"hidden": dict(state.encoder.params["hidden"])}
                damaged["hidden"]["kernel"] = damaged["hidden"]["kernel"].at[1, 2].set(value)
                state = state._replace(encoder=state.encoder._replace(params=damaged))
            return step(hyperparameters, state, batch)

        return damaged_step

    patch.setattr(training, "make_train_step", make_train_step)


def in_a_gradient(patch, config, value):
    """Puts the value into one gradient before the optimizer sees it."""

    def update(gradients, count, params=None):
        leaves, structure = jax.tree.flatten(gradients)
        leaves[0] = leaves[0].at[(0,) * leaves[0].ndim].set(jnp.where(count == STEP, value, leaves[0].ravel()[0]))
        return jax.tree.unflatten(structure, leaves), count + 1

    damage = optax.GradientTransformation(lambda params: jnp.zeros([], jnp.int32), update)
    original = train_step.make_optimizer
    patch.setattr(train_step, "make_optimizer", lambda *args: optax.chain(damage, original(*args)))


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("damage", [in_an_image, in_a_parameter, in_a_gradient], ids=lambda damage: damage.__name__)
def test_the_run_stops_at_the_step_and_keeps_a_good_checkpoint(damage, value, tmp_path, monkeypatch):
    options = [*DIGITS, "--max-epochs", "4", "--precision", "float32", "--workdir", str(tmp_path)]
    config = parse_train_options(options)
    monkeypatch.setattr(training, "device_mesh", functools.partial(device_mesh, 1))
    damage(monkeypatch, config, value)
    with pytest.raises(DivergenceError, match=f"Step {STEP} has"):
        training.train(config)
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(STEP))
    assert not (tmp_path / "embeddings").exists()
    with Checkpoints(tmp_path) as store:
        assert store.latest_step() == 6
        template = create_state.eval_shape(config.model, Hyperparameters.of(config.training, 5), device_mesh(1))
        _, *state = store.restore(template.encoder, template.optimizer, replicated(device_mesh()), "latest")
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(state))


@pytest.fixture(autouse=True)
def repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(autouse=True)
def programs_of_their_own():
    """Neither the compiled programs of other tests for the damaged runs, nor the damaged ones for other tests."""
    forget_programs()
    yield
    forget_programs()


def forget_programs():
    jax.clear_caches()
    train_step._compiled_step.cache_clear()
