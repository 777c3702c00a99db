"""Comparison of runs: grouping, means and spreads computed by hand, and which results are read or measured."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from empssl_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, TrainingConfig
from empssl_jax.config.command_options import EvaluateOptions
from empssl_jax.config.errors import UserError
from empssl_jax.evaluation import comparison
from empssl_jax.evaluation import evaluate as evaluation
from empssl_jax.parse_options import parse_evaluations
from empssl_jax.run_folder import saved_config
from empssl_jax.run_folder.results import add_results, load_results, on_dataset, recorded

KNN = {0: (0.30, 0.80), 1: (0.34, 0.84), 2: (0.44, 0.88)}  # top-1 and top-5 by seed


def write_run(folder, seed, top1, top5, linear=True, **training):
    folder.mkdir(parents=True)
    saved_config.save_config(folder, Config(training=TrainingConfig(seed=seed, **training)))
    results = {"kNN": {"top1": top1, "top5": top5}}
    if linear:
        results["linear"] = {"top1": top1 + 0.1, "top5": 1.0}
    (folder / "results.json").write_text(json.dumps(results))
    return str(folder)


def compare(*folders, options=()):
    comparison.evaluate_all(
        parse_evaluations(["--workdir", *map(str, folders), *options]), write_report=lambda *_: None
    )


@pytest.fixture
def no_evaluation(monkeypatch):
    evaluated = []
    monkeypatch.setattr(evaluation, "evaluate", lambda options, write_report: evaluated.append(options) or {})
    return evaluated


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_an_error_of_one_process_of_several_ends_the_comparison(tmp_path, monkeypatch):
    """The other processes may not have met it, and would wait for ever if this one went on to the next run."""

    def fail(options, write_report):
        raise UserError(f"{options.workdir} is in use")

    folders = [write_run(tmp_path / name, 1, 0.3, 0.8, linear=False) for name in "ab"]
    monkeypatch.setattr(evaluation, "evaluate", fail)
    for processes, message in ((1, "2 of 2 runs could not be measured"), (2, f"{folders[0]} is in use")):
        monkeypatch.setattr("jax.process_count", lambda number=processes: number)
        with pytest.raises(UserError, match=message):
            compare(*folders)


def test_given_embeddings_and_several_runs_are_refused(tmp_path):
    folders = [write_run(tmp_path / name, 1, 0.3, 0.8) for name in "ab"]
    with pytest.raises(UserError, match=r"^--embeddings is 'e': they are measured as they are, so leave out --workdir"):
        compare(*folders, options=["--embeddings", "e"])


def test_mean_and_spread_over_seeds(tmp_path, no_evaluation, capsys):
    folders = [write_run(tmp_path / f"s{seed}", seed, *accuracy) for seed, accuracy in KNN.items()]
    folders.append(write_run(tmp_path / "slow", 5, 0.2, 0.7, learning_rate=0.1))
    (tmp_path / "notes.txt").touch()
    compare(*folders, tmp_path / "notes.txt")
    table = (tmp_path / "comparison.md").read_text()
    header, _, fast, slow, *_ = table.splitlines()
    assert cells(header) == ["runs", "n", "seeds", "kNN top-1", "kNN top-5", "linear top-1", "linear top-5"]
    # 30, 34 and 44 have the mean 36 and the deviations -6, -2 and 8, whose squares add up to 104. 104 / 2 = 52.
    assert cells(fast) == [
        "--learning-rate 0.3",
        "3",
        "0, 1, 2",
        f"36.00 ± {52**0.5:.2f} %",
        "84.00 ± 4.00 %",
        f"46.00 ± {52**0.5:.2f} %",
        "100.00 ± 0.00 %",
    ]
    assert cells(slow) == ["--learning-rate 0.1", "1", "5", "20.00 %", "70.00 %", "30.00 %", "100.00 %"]
    assert "differ only in --seed" in table
    printed = capsys.readouterr().out
    assert table in printed
    assert f"skipping folders that are not runs: {tmp_path / 'notes.txt'}" in printed
    assert no_evaluation == []


@pytest.mark.parametrize(
    "options", [{"embedding_batch_size": 7}, {"logistic": True}, {"untrained": True}, {"report": False}, {}]
)
def test_options_that_change_no_result_share_a_row(options):
    both = [
        Config(training=TrainingConfig(seed=0)),
        Config(DataConfig(strict_images=True), training=TrainingConfig(seed=1), evaluation=EvaluationConfig(**options)),
    ]
    results = [{"kNN": {"top1": 0.3, "top5": 0.5}}, {"kNN": {"top1": 0.5, "top5": 0.5}, "logistic": {"top1": 0.6}}]
    runs = [comparison.Measured(Path("run"), *run) for run in zip(both, results, strict=True)]
    header, _, *rows = comparison.markdown(runs).split("\n\n")[0].splitlines()
    assert cells(header) == ["runs", "n", "seeds", "kNN top-1", "kNN top-5", "logistic top-1"]
    assert [cells(row) for row in rows] == [
        ["all", "2", "0, 1", f"40.00 ± {200**0.5:.2f} %", "50.00 ± 0.00 %", "60.00 % (n = 1)"]
    ]


def test_the_same_seed_twice_is_one_sample(tmp_path, no_evaluation):
    compare(*(write_run(tmp_path / name, 3, 0.5, 0.9) for name in ("a", "b")))
    assert cells((tmp_path / "comparison.md").read_text().splitlines()[2])[:4] == ["all", "1", "3", "50.00 %"]


def test_only_missing_results_and_changed_options_are_measured(tmp_path, no_evaluation):
    done, missing = write_run(tmp_path / "a", 0, 0.5, 0.9), write_run(tmp_path / "b", 1, 0.5, 0.9, linear=False)
    compare(done, missing)
    assert [options.workdir for options in no_evaluation] == [missing]
    no_evaluation.clear()
    compare(done, missing, options=["--num-neighbours", "5"])
    assert [options.workdir for options in no_evaluation] == [done, missing]
    assert {options.evaluation.num_neighbours for options in no_evaluation} == {5}


def test_results_of_other_embeddings_are_measured_again(tmp_path, no_evaluation):
    folders = [write_run(tmp_path / name, 0, 0.5, 0.9) for name in ("a", "b")]
    for folder, options in zip(folders, (EvaluationConfig(), EvaluationConfig(whiten=True)), strict=True):
        add_results(Path(folder), recorded({"kNN": {"top1": 0.5, "top5": 0.9}}, embeddings=options.embeddings))
    compare(*folders)
    assert [options.workdir for options in no_evaluation] == folders[1:]
    # Without a linear classifier, a linear accuracy of other embeddings is neither shown nor measured again.
    old = {"linear": {"top1": 0.6, "top5": 1.0}}
    add_results(Path(folders[0]), recorded(old, embeddings=EvaluationConfig(whiten=True).embeddings))
    config = Config(evaluation=EvaluationConfig(linear_epochs=0))
    saved_config.save_config(Path(folders[0]), config)
    no_evaluation.clear()
    compare(folders[0], folders[0])
    assert no_evaluation == []
    header = (tmp_path / "comparison.md").read_text().splitlines()[0]
    assert cells(header)[3:] == ["kNN top-1", "kNN top-5"]


@pytest.mark.parametrize(
    ("options", "changed", "again"),
    [
        ([], {}, False),
        (["--num-neighbours=3"], {"num_neighbours": 3}, True),
        (["--temperature=0.5"], {"temperature": 0.5}, True),
        (["--linear-learning-rate=0.01"], {"linear_learning_rate": 0.01}, True),
        (["--step=1"], {"step": 1}, True),
    ],
)
def test_results_of_other_options_or_checkpoints_are_measured_again(
    tiny_run, tmp_path, monkeypatch, options, changed, again
):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    config = saved_config.load_config(folder)
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, linear_epochs=1))
    saved_config.save_config(folder, config)
    compare(folder, options=[*options, "--no-report"])
    measured = load_results(folder)
    assert {measured[name]["step"] for name in ("effective rank", "kNN", "linear")} == {changed.get("step", 2)}
    recorded = measured["kNN"]["options"] | measured["linear"]["options"]
    own = dataclasses.asdict(config.evaluation)
    differing = {name: value for name, value in recorded.items() if value != own[name]}
    assert differing == {name: value for name, value in changed.items() if name != "step"}
    evaluated = []
    monkeypatch.setattr(evaluation, "evaluate", lambda options, write_report: evaluated.append(options) or {})
    compare(folder, folder)
    assert len(evaluated) == 2 * again


def test_the_accuracy_before_training_is_measured_by_train_only(tmp_path):
    folder = write_run(tmp_path / "a", 0, 0.5, 0.9)
    with pytest.raises(UserError, match=r"^--untrained is True: only empssl train measures kNN before"):
        compare(folder, options=["--untrained"])


def test_results_of_another_checkpoint_are_not_compared(tmp_path, monkeypatch):
    """Of a run measured at step 2, the logistic regression of step 1 is left out; results without a step stay."""

    def measure(options, write_report):
        return add_results(Path(options.workdir), {"kNN": {"top1": 0.5, "top5": 0.9, "step": 2}})

    monkeypatch.setattr(evaluation, "evaluate", measure)
    folders = [write_run(tmp_path / name, seed, 0.3, 0.8) for seed, name in enumerate("ab")]
    for folder in folders:
        add_results(Path(folder), {"logistic": {"top1": 0.6, "top5": 1.0, "step": 1}})
    compare(*folders, options=["--step", "2"])
    header, _, row, *_ = (tmp_path / "comparison.md").read_text().splitlines()
    assert cells(header)[3:] == ["kNN top-1", "kNN top-5", "linear top-1", "linear top-5"]
    assert cells(row)[3] == "50.00 ± 0.00 %"


def test_one_run_is_evaluated_without_a_comparison(tmp_path, no_evaluation):
    folder = write_run(tmp_path / "a", 0, 0.5, 0.9)
    compare(folder)
    expected = dataclasses.replace(EvaluateOptions(), workdir=folder, evaluation=EvaluationConfig())
    assert no_evaluation == [expected]
    assert not (tmp_path / "comparison.md").exists()


def test_another_data_set_has_a_row_of_its_own(tmp_path, no_evaluation):
    folders = [write_run(tmp_path / f"s{seed}", seed, *accuracy) for seed, accuracy in KNN.items()]
    for folder, top1 in zip(folders[:2], (0.1, 0.3), strict=True):
        there = on_dataset("cifar100", {"kNN": {"top1": top1, "top5": 0.5}, "linear": {"top1": top1, "top5": 0.5}})
        add_results(Path(folder), there)
    compare(*folders)
    _, _, own, other, *_ = (tmp_path / "comparison.md").read_text().splitlines()
    assert cells(own)[:4] == ["all", "3", "0, 1, 2", f"36.00 ± {52**0.5:.2f} %"]
    # 10 and 30 have the mean 20 and the deviations -10 and 10, whose squares add up to 200. 200 / 1 = 200.
    assert cells(other)[:4] == ["all, measured on cifar100", "2", "0, 1", f"20.00 ± {200**0.5:.2f} %"]
    compare(*folders, options=["--dataset", "cifar100"])
    assert [options.workdir for options in no_evaluation] == folders[2:]


def test_effective_ranks_have_a_column(tmp_path, no_evaluation):
    folders = [write_run(tmp_path / f"s{seed}", seed, *accuracy) for seed, accuracy in KNN.items()]
    compare(*folders)
    assert "effective rank" not in (tmp_path / "comparison.md").read_text()
    for folder, rank in zip(folders[:2], (10.0, 14.0), strict=True):
        add_results(Path(folder), {"effective rank": {"rank": rank, "images": 500, "dimensions": 64}})
    compare(*folders)
    header, _, row, *_ = (tmp_path / "comparison.md").read_text().splitlines()
    assert cells(header)[3:] == ["kNN top-1", "kNN top-5", "linear top-1", "linear top-5", "effective rank"]
    # 10 and 14 have the mean 12 and the deviations -2 and 2, whose squares add up to 8. 8 / 1 = 8.
    assert cells(row)[-1] == f"12.00 ± {8**0.5:.2f} (n = 2)"
    assert "Compare effective ranks only" in (tmp_path / "comparison.md").read_text()
    assert no_evaluation == []


def test_runs_of_the_same_images_share_a_row_wherever_these_are(tmp_path, no_evaluation):
    folders = [write_run(tmp_path / f"s{seed}", seed, *accuracy) for seed, accuracy in KNN.items()]
    for folder, place, fingerprint in zip(folders, "xyz", "aab", strict=True):
        config = saved_config.load_config(Path(folder))
        data = dataclasses.replace(config.data, dataset=f"folder:/{place}")
        saved_config.save_config(Path(folder), dataclasses.replace(config, data=data))
        images = saved_config.SavedImages(32, {"train": fingerprint, "test": "t"})
        saved_config.save_images(Path(folder), images)
    compare(*folders)
    _, _, *rows = (tmp_path / "comparison.md").read_text().split("\n\n")[0].splitlines()
    assert [cells(row)[:3] for row in rows] == [
        ["--dataset folder:/x", "2", "0, 1"],
        ["--dataset folder:/z", "1", "2"],
    ]


def test_the_others_are_compared_if_a_run_cannot_be_measured(tmp_path, capsys):
    folders = [write_run(tmp_path / f"s{seed}", seed, *accuracy) for seed, accuracy in KNN.items()]
    model = ModelConfig(width=2, hidden_dim=4, projection_dim=4, precision="float32")
    saved_config.save_config(tmp_path / "s1", Config(model=model))
    (tmp_path / "s1" / "results.json").unlink()  # a run without results and without a checkpoint
    (tmp_path / "s2" / "config.json").write_text("{")
    with pytest.raises(UserError) as error:
        compare(*folders)
    table = (tmp_path / "comparison.md").read_text()
    assert [cells(row)[:4] for row in table.splitlines()[2:3]] == [["all", "1", "0", "30.00 %"]]
    assert table in capsys.readouterr().out
    said = str(error.value)
    assert said.startswith("2 of 3 runs could not be measured: ")
    assert f"{folders[1]} ({tmp_path}/s1/checkpoints holds no checkpoint: train first" in said
    assert f"{folders[2]} ({folders[2]}/config.json is not a config" in said


def test_folders_that_are_not_runs_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"names 2 folders, and none has a config\.json: give runs"):
        parse_evaluations(["--workdir", str(tmp_path), str(tmp_path / "none")])
