"""Logging to Weights & Biases."""

import dataclasses
import importlib.util
import json

import pytest
from synthetic_run import CONFIG

from empssl_jax import training
from empssl_jax.config import RunConfig
from empssl_jax.config.errors import UserError
from empssl_jax.run_folder import loggers

HAS_WANDB = importlib.util.find_spec("wandb") is not None


def config_in(folder):
    return dataclasses.replace(CONFIG, run=RunConfig(workdir=str(folder), wandb=True))


@pytest.mark.skipif(HAS_WANDB, reason="wandb is installed")
def test_missing_wandb_is_reported_before_anything_is_computed(tmp_path):
    with pytest.raises(UserError, match=r"--wandb needs .*pip install -e \"\.\[wandb\]\""):
        training.train(config_in(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not HAS_WANDB, reason='pip install -e ".[wandb]" for the test of it')
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_gets_the_config_and_each_step(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = []
    run = loggers.WandbRun(config_in(tmp_path))
    monkeypatch.setattr(run._run, "log", logged.append)
    run.add(3, {"train/loss": -2.0})
    assert logged == [{"train/loss": -2.0, "step": 3}]
    assert json.loads(json.dumps(run._run.config.as_dict()))["training"]["batch_size"] == 40
    run.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
