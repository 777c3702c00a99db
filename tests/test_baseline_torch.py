"""The PyTorch baseline reproduces the same golden numbers. Skipped without the extra `bench`."""

import numpy as np
import pytest
from conftest import torch_weights

from empssl_jax.config import Config, ModelConfig, PatchConfig, TrainingConfig
from empssl_jax.config.errors import UserError

torch = pytest.importorskip("torch", reason="pip install -e '.[bench]'")
baseline = pytest.importorskip("benchmarks.baseline_torch")


@pytest.fixture(scope="module")
def trained_once(golden):
    """The golden numbers and network, with its embeddings, loss and gradients after one pass in training mode."""
    numbers = golden("resnet18")
    model = baseline.Encoder(hidden_dim=64, projection_dim=32)
    state = model.state_dict()
    assert sorted(state) == sorted(map(str, numbers["names"]))
    shapes = {name: tuple(array.shape) for name, array in state.items()}
    weights = torch_weights(map(str, numbers["names"]), int(numbers["weight_seed"]), shapes)
    model.load_state_dict({name: torch.tensor(array, dtype=torch.float32) for name, array in weights.items()}, False)
    images = torch.from_numpy(np.moveaxis(numbers["images"], -1, 1).astype(np.float32).copy())
    model.train()
    embeddings, projections = model(images)
    loss = baseline.emp_ssl_loss(projections.unflatten(0, (3, 4)).transpose(0, 1))
    loss.backward()
    return numbers, model, embeddings, float(loss.detach())


def test_golden_outputs_and_loss(trained_once):
    numbers, _, embeddings, loss = trained_once
    expected = numbers["train_embeddings"]
    assert np.abs(embeddings.detach().numpy() - expected).max() < 1e-3 * np.abs(expected).max()
    assert loss == pytest.approx(float(numbers["loss"]), rel=1e-4)


def test_golden_gradients(trained_once):
    numbers, model, *_ = trained_once
    for name, parameter in model.named_parameters():
        assert float(parameter.grad.norm()) == pytest.approx(float(numbers[f"gradnorm/{name}"]), rel=5e-3), name


def test_golden_losses(golden):
    numbers = golden("losses")
    for case in range(5):
        z = torch.tensor(numbers[f"{case}_projections"], dtype=torch.float64)
        z = torch.nn.functional.normalize(z, dim=-1)
        for rate in (baseline.coding_rate, baseline.helped_coding_rate):
            assert float(-rate(z)) == pytest.approx(float(numbers[f"{case}_coding_rate_loss"]), rel=1e-4)
        assert float(-baseline.similarity(z)) == pytest.approx(float(numbers[f"{case}_invariance_loss"]), rel=1e-4)


def test_golden_lars(golden):
    numbers = golden("lars")
    names = [key.removeprefix("init_") for key in numbers if key.startswith("init_")]
    parameters = [torch.nn.Parameter(torch.tensor(numbers[f"init_{name}"])) for name in names]
    sgd = torch.optim.SGD(parameters, lr=0.3, momentum=0.9, nesterov=True)
    lars = baseline.LARS(sgd, weight_decay=1e-4)
    for t in range(12):
        for group in sgd.param_groups:
            group["lr"] = float(numbers[f"lr_{t}"])
        for name, parameter in zip(names, parameters, strict=True):
            parameter.grad = torch.tensor(numbers[f"grad_{t}_{name}"])
        lars.step()
        for name, parameter in zip(names, parameters, strict=True):
            np.testing.assert_allclose(parameter.detach(), numbers[f"param_{t}_{name}"], rtol=1e-4, atol=1e-6)


def test_golden_knn(golden):
    numbers = golden("knn")
    queries, bank, labels = (torch.from_numpy(numbers[name]) for name in ("queries", "bank", "bank_labels"))
    scores = baseline.knn_scores(
        queries.float(), bank.float(), labels.long(), 10, int(numbers["k"]), float(numbers["temperature"])
    )
    np.testing.assert_allclose(scores, numbers["scores"], rtol=1e-3, atol=1e-3 * numbers["scores"].max())


def test_patches_have_the_shape_and_range_of_ours(golden):
    images = golden("augmentations")["images"]
    dataset = baseline.PatchDataset(images, np.arange(len(images)), num_patches=5)
    patches, label = dataset[2]
    assert tuple(patches.shape) == (5, 3, 32, 32)
    assert label == 2
    assert -1 <= float(patches.min()) < float(patches.max()) <= 1


def test_options_that_the_baseline_does_not_follow_are_refused():
    torch_run = pytest.importorskip("experiments.torch_run")
    torch_run.check_followed(Config(training=TrainingConfig(batch_size=50), model=ModelConfig(width=16)))
    for config in (Config(training=TrainingConfig(momentum=0.5)), Config(patches=PatchConfig(patch_area=0.3))):
        with pytest.raises(UserError, match=r"the PyTorch baseline does not follow it, so leave it at 0.(9|25)"):
            torch_run.check_followed(config)
