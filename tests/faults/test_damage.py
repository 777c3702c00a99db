"""Checkpoints with damaged files: a restore returns exactly what was saved, or an earlier checkpoint, or fails."""

import gc
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empssl_jax.config.errors import UserError
from empssl_jax.method.encoder import EncoderState
from empssl_jax.run_folder import checkpoints
from empssl_jax.runtime.devices import device_mesh, replicated

STEPS = (1, 2, 3)
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def leftovers():
    """Collects the reads that Orbax abandons after a failed one. Python would report them in a later test."""
    yield
    gc.collect()


def state_of(step: int):
    random = np.random.RandomState(step)
    weights = {name: jnp.asarray(random.standard_normal((30, 20)), jnp.float32) for name in ("a", "b")}
    return EncoderState(weights, {"mean": jnp.full(3, float(step))}), ({"trace": weights["a"] * 2}, jnp.int32(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    with checkpoints.Checkpoints(workdir, max_to_keep=3) as store:
        for step in STEPS:
            store.save(step, *state_of(step), loss=-float(step))
    return workdir


def restore(workdir: Path, which="latest"):
    with checkpoints.Checkpoints(workdir) as store:
        template = jax.eval_shape(lambda: state_of(1))
        return store.restore(*template, replicated(device_mesh(1)), which)


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path):
    path.write_bytes(b"")


def flip_a_bit(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0b100
    path.write_bytes(content)


def overwrite_the_end(path: Path):
    content = path.read_bytes()
    path.write_bytes(content[: -len(content) // 3] + bytes(len(content) // 3))


DAMAGE = (truncate, empty, flip_a_bit, overwrite_the_end, Path.unlink)


def assert_is_the_state_of(step, encoder, optimizer):
    for ours, theirs in zip(jax.tree.leaves((encoder, optimizer)), jax.tree.leaves(state_of(step)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_every_file_of_the_newest_checkpoint_damaged_in_turn(saved, tmp_path, capsys, damage):
    newest = saved / "checkpoints" / "3"
    names = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
    noticed = set()
    for i, name in enumerate(names):
        workdir = tmp_path / str(i)
        shutil.copytree(saved, workdir)
        if (workdir / "checkpoints" / "3" / name).stat().st_size == 0 and damage is not Path.unlink:
            continue
        damage(workdir / "checkpoints" / "3" / name)
        capsys.readouterr()
        step, *state = restore(workdir)
        warned = "is damaged" in capsys.readouterr().err
        assert step in (2, 3), name
        assert warned == (step == 2), name
        assert_is_the_state_of(step, *state)
        if step == 2:
            noticed.add(name)
            with pytest.raises(UserError, match="No undamaged checkpoint"):
                restore(workdir, 3)
    print(f"{damage.__name__}: {len(noticed)} of {len(names)} files matter")
    # The number of files that TensorStore writes, and how many of them matter, differs between runs.
    assert {"encoder", "optimizer", "record"} <= {name.split("/")[0] for name in noticed}


def test_all_checkpoints_damaged_is_an_error_and_not_a_fresh_start(saved, tmp_path):
    workdir = tmp_path / "all"
    shutil.copytree(saved, workdir)
    for path in (workdir / "checkpoints").rglob("*"):
        if path.is_file():
            flip_a_bit(path)
    with pytest.raises(UserError, match=r"No undamaged checkpoint is left in .* \(tried 3, 2, 1\)"):
        restore(workdir)


def test_damaged_checkpoints_are_set_aside_and_their_steps_saved_again(saved, tmp_path):
    workdir = tmp_path / "aside"
    shutil.copytree(saved, workdir)
    for step in (2, 3):
        for path in (workdir / "checkpoints" / str(step) / "encoder").rglob("*"):
            if path.is_file():
                truncate(path)
    with checkpoints.Checkpoints(workdir) as store:
        template = jax.eval_shape(lambda: state_of(1))
        step, *_ = store.restore(*template, replicated(device_mesh(1)), "latest")
        assert step == 1
        store.set_aside_after(step)
        assert store.latest_step() == 1
        store.save(2, *state_of(2), loss=0.0)
    assert {path.name for path in (workdir / "damaged").iterdir()} == {"2", "3"}
    step, *state = restore(workdir)
    assert step == 2
    assert_is_the_state_of(2, *state)
