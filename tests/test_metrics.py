"""metrics.jsonl gets each step once, in order, one step late."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from empssl_jax.config.errors import DivergenceError
from empssl_jax.run_folder.metrics import MetricsWriter


def metrics_of(loss):
    names = ("loss", "coding_rate", "similarity", "learning_rate", "update_norm")
    return dict.fromkeys(names, jnp.float32(loss))


def writer_in(folder, first_step=0):
    return MetricsWriter(folder, first_step, 10, patches_per_step=100, coding_rate_bounds=(-4.0, 6.0))


def steps_in(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_written_one_step_late_until_flushed(tmp_path):
    with writer_in(tmp_path) as writer:
        writer.add(0, metrics_of(1.0))
        assert steps_in(tmp_path) == []
        writer.add(1, metrics_of(4.0))
        assert steps_in(tmp_path) == [0]
        assert writer.flush() == 2.5
        assert steps_in(tmp_path) == [0, 1]
        writer.add(2, metrics_of(-3.0))
        assert writer.flush() == -3.0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    np.testing.assert_allclose([json.loads(line)["coding_rate_fraction"] for line in lines], [0.5, 0.8, 0.1], rtol=1e-6)


def test_resuming_drops_the_steps_that_run_again(tmp_path):
    with writer_in(tmp_path) as writer:
        for step in range(5):
            writer.add(step, metrics_of(step))
        writer.flush()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "los')  # incomplete: the process was killed
    with writer_in(tmp_path, first_step=3) as writer:
        writer.add(3, metrics_of(30.0))
        writer.flush()
    assert steps_in(tmp_path) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["loss", "update_norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_metrics_that_are_not_finite_stop_the_run_by_name(tmp_path, name, value):
    with writer_in(tmp_path) as writer:
        writer.add(7, metrics_of(1.0) | {name: jnp.float32(value)})
        remedy = "any checkpoint before it is kept; try a lower --learning-rate in another --workdir"
        with pytest.raises(DivergenceError, match=f"^Step 7 has loss .*: {remedy}\\.$"):
            writer.flush()
    assert steps_in(tmp_path) == []
