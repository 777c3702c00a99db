"""Tables for given times, and FLOP counts compared with published ones."""

import gzip

import jax
import pytest
from jax.profiler import ProfileData

from benchmarks import limits, measure, profile_table, scaling, train_step
from empssl_jax.config import Config, EvaluationConfig, ModelConfig, TrainingConfig
from empssl_jax.runtime.devices import device_mesh
from experiments import study


def test_a_ratio_above_one_means_that_ours_is_better():
    seconds = ([1.0, 2.0, 3.0], [4.0, 6.0, 3.0])
    for amount, ours, theirs in ((None, 2.0, 4.0), (20.0, 10.0, 5.0)):
        row = measure.make_row("row", seconds, amount=amount, unit="")
        assert (row["ours"], row["theirs"], row["ratio"], row["spread"]) == (ours, theirs, 3.0, (1.0, 4.0))


def test_a_row_without_the_baseline_says_so():
    row = measure.make_row("row", ([2.0], []), amount=None, unit="s", target="2")
    assert (row["theirs"], row["ratio"], row["spread"]) == (None, None, None)
    assert measure.markdown([row]).splitlines()[-1] == "| row | 2 | - | s | not measured | 2 |"


def test_ours_and_theirs_run_in_turn():
    calls = []
    seconds = measure.compare(lambda: calls.append("ours"), lambda: calls.append("theirs"), repeats=2)
    assert calls == ["ours", "theirs"] * 3
    assert list(map(len, seconds)) == [2, 2]
    calls.clear()
    seconds = measure.compare(lambda: calls.append("ours"), None, repeats=2, warm_up=False)
    assert calls == ["ours"] * 2
    assert list(map(len, seconds)) == [2, 0]


def test_the_first_run_is_not_measured():
    calls = []
    assert len(measure.run_times(lambda: calls.append(1), repeats=3)) == 3
    assert len(calls) == 4


def test_abstract_arguments_are_those_of_a_step_without_values():
    model = ModelConfig(width=4, hidden_dim=8, projection_dim=4, precision="float32")
    config, mesh = Config(model=model, training=TrainingConfig(batch_size=2)), device_mesh(1)
    made, abstract = train_step.step_arguments(config, mesh), train_step.abstract_arguments(config, mesh)
    assert jax.tree.structure(made) == jax.tree.structure(abstract)
    for array, shape in zip(jax.tree.leaves(made), jax.tree.leaves(abstract), strict=True):
        assert (array.shape, array.dtype, array.sharding) == (shape.shape, shape.dtype, shape.sharding)


def test_flops_of_a_resnet_18_on_32x32():
    """0.56 G multiplications (published for the variant without pooling), plus 2.1 M for the hidden layer."""
    flops = limits.flops_per_patch(ModelConfig(), 32, training=False)
    assert flops / 2 == pytest.approx(0.5558e9 + 512 * 4096, rel=2e-3)


def test_training_counts_three_passes_of_all_but_the_stem():
    config = ModelConfig()
    forward = limits.flops_per_patch(config, 32, training=False)
    heads = 2 * 4096 * (4096 + 1024)
    stem = 2 * 9 * 3 * 64 * 32 * 32
    assert limits.flops_per_patch(config, 32) == 3 * (forward + heads) - stem


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5])
def test_exponents_of_powers(power):
    values = [1, 2, 4, 8]
    assert scaling.exponent(values, [3 * value**power for value in values]) == pytest.approx(power, abs=1e-9)


def test_a_row_of_the_study_has_mean_spread_and_difference_to_the_same_seeds():
    lines = [
        {"row": "base", "seed": 1, "kNN": 40.0},
        {"row": "base", "seed": 2, "kNN": 44.0},
        {"row": "batch 25", "seed": 2, "kNN": 45.0},
    ]
    assert study.table(lines).splitlines()[2:] == ["| base | 2 | 42.0 (2.8) | +0.0 |", "| batch 25 | 1 | 45.0 | +1.0 |"]


def test_the_study_changes_the_named_options():
    config = study.changed(study.LONG, {"batch_size": 25, "patch_area": 0.4, "valid_patches": 4})
    assert (config.training.batch_size, config.patches.patch_area, config.evaluation.valid_patches) == (25, 0.4, 4)
    assert config.model == study.LONG.model
    batches = [study.changed(study.SIZES[size], {"batch_size": 0.5}).training.batch_size for size in ("long", "full")]
    assert batches == [25, 50]
    with pytest.raises(TypeError, match="no group of the config has learning_rat"):
        study.changed(study.LONG, {"learning_rat": 0.1, "batch_size": 25})


@pytest.mark.parametrize("size", study.SIZES)
def test_every_row_of_the_study_is_a_config_of_its_own(size):
    assert study.TRAINING["base"].changes == {}
    runs = [study.changed(study.SIZES[size], row.changes) for row in study.TRAINING.values()]
    measures = [study.RECOMMENDED, *(EvaluationConfig(**changes) for changes in study.EVALUATION.values())]
    for configs in (runs, measures):
        assert all(config not in configs[:number] for number, config in enumerate(configs))


def test_the_profile_table_sums_kernels_by_kind(tmp_path):
    """Two steps: 6 ms of convolutions, 3 of sums and 1 of copies. A second device and the host do not count."""
    kernels = {"sm90_xmma_fprop_gemm": 4, "input_reduce_fusion_3": 3, "sm90_xmma_wgrad_gemm": 2, "Memset 0": 1}
    names = "".join(
        f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}' for i, name in enumerate(kernels)
    )
    events = [
        f"events {{ metadata_id: {i} duration_ps: {milliseconds * 10**9} }}"
        for i, milliseconds in enumerate(kernels.values())
    ]
    line = f'lines {{ name: "Stream #1(Compute)" {" ".join(events)} }}'
    planes = "".join(
        f'planes {{ name: "{name}" {line} {names} }}' for name in ("/device:GPU:0", "/device:GPU:1", "/host:CPU")
    )
    path = tmp_path / "plugins" / "step.xplane.pb.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(ProfileData.text_proto_to_serialized_xspace(planes)))
    found = profile_table.kinds(profile_table.read_profile(tmp_path), steps=2)
    assert found == {"convolutions": (3.0, 1.0), "reductions": (1.5, 0.5), "copies": (0.5, 0.5)}
    assert profile_table.table(found).splitlines()[2:] == [
        "| convolutions | 3.00 | 60% | 1 |",
        "| reductions | 1.50 | 30% | 0 |",
        "| copies | 0.50 | 10% | 0 |",
        "| all | 5.00 | 100% | 2 |",
    ]
