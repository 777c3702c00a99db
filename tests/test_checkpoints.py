"""Saving, keeping, restoring and refusing checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empssl_jax import config, training
from empssl_jax.config.errors import DivergenceError, UserError
from empssl_jax.method.encoder import EncoderState
from empssl_jax.run_folder import checkpoints, saved_config
from empssl_jax.runtime.devices import device_mesh, replicated


def encoder_of(value: float) -> EncoderState:
    return EncoderState({"w": jnp.full((4, 3), value)}, {"mean": jnp.full(3, -value)})


OPTIMIZER = ({"trace": jnp.arange(5.0)}, jnp.int32(7))


@pytest.fixture
def workdir(tmp_path):
    """A run with checkpoints at steps 1 to 4, of which step 1 has the lowest loss."""
    with checkpoints.Checkpoints(tmp_path, max_to_keep=2) as store:
        for step, loss in [(1, -9.0), (2, -5.0), (3, -6.0), (4, -7.0)]:
            store.save(step, encoder_of(float(step)), OPTIMIZER, loss)
    return tmp_path


def restore(workdir, which):
    with checkpoints.Checkpoints(workdir) as store:
        templates = jax.eval_shape(lambda: (encoder_of(0.0), OPTIMIZER))
        return store.restore(*templates, replicated(device_mesh(1)), which)


@pytest.mark.parametrize(("which", "step"), [("latest", 4), ("best", 1), (3, 3)])
def test_restores_what_was_saved(workdir, which, step):
    restored, encoder, optimizer = restore(workdir, which)
    assert restored == step
    np.testing.assert_array_equal(encoder.params["w"], np.full((4, 3), step))
    np.testing.assert_array_equal(encoder.batch_stats["mean"], np.full(3, -step))
    assert jax.tree.structure(optimizer) == jax.tree.structure(OPTIMIZER)
    np.testing.assert_array_equal(optimizer[0]["trace"], np.arange(5))


@pytest.mark.parametrize(("every", "saved"), [(None, [5, 10, 15, 20]), (8, [8, 16, 20]), (10, [10, 20]), (100, [20])])
def test_the_steps_that_are_saved(every, saved):
    """20 steps, in epochs of 5."""
    run, steps = config.RunConfig(checkpoint_every=every), training.Steps(per_epoch=5, last=20)
    assert [step for step in range(1, 21) if training._checkpoint_is_due(run, step, steps)] == saved


def test_keeps_the_newest_and_the_best(workdir):
    kept = {int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {1, 3, 4}


def test_a_missing_step_is_refused_with_the_available_steps(workdir):
    with pytest.raises(UserError, match=r"--step is 2: .* has 1, 3, 4"):
        restore(workdir, 2)


def test_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        restore(tmp_path, "latest")


def test_an_unfinished_save_is_removed(workdir):
    left = workdir / "checkpoints" / "5.orbax-checkpoint-tmp-123"
    left.mkdir()
    assert restore(workdir, "latest")[0] == 4
    assert not left.exists()


def test_a_state_that_is_not_finite_is_not_saved(workdir):
    with checkpoints.Checkpoints(workdir) as store:
        for bad in (np.nan, np.inf):
            encoder = EncoderState({"w": jnp.ones((4, 3))}, {"mean": jnp.full(3, bad)})
            with pytest.raises(DivergenceError, match=r"Step 4 has made .*'mean'.* not finite: .* another --workdir"):
                store.save(5, encoder, OPTIMIZER, -1.0)
    assert restore(workdir, "latest")[0] == 4


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        saved_config.load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"data": 3}')
    with pytest.raises(UserError, match="is not a config of this version"):
        saved_config.load_config(tmp_path)
