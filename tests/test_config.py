"""Options: validation, conversion to JSON and back, and the command line."""

import dataclasses
import json
from pathlib import Path

import pytest

from empssl_jax import config
from empssl_jax.config import Config, training_differences
from empssl_jax.config.command_options import EvaluateOptions, ExportOptions, ImportOptions, ReportOptions
from empssl_jax.config.config_files import parse_train_options, read_config_file
from empssl_jax.config.errors import UserError, counted
from empssl_jax.parse_options import parse_embed_options, parse_evaluate_options, parse_evaluations
from empssl_jax.report import tables
from empssl_jax.run_folder import saved_config

REPOSITORY = Path(__file__).parent.parent
GROUPS = [field.default_factory for field in dataclasses.fields(Config)]


def test_nouns_after_numbers():
    assert [counted(number, "image") for number in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert [counted(number, "class") for number in (1, 3)] == ["1 class", "3 classes"]
    assert [counted(number, "random patch") for number in (1, 3)] == ["1 random patch", "3 random patches"]


def out_of_range():
    """Yields every field that has a range, with values that it must refuse."""
    for group in GROUPS:
        for field in dataclasses.fields(group):
            if "range" in field.metadata:
                allowed = field.metadata["range"]
                wrong = [allowed.low - 1, allowed.low - 1e-9, allowed.high + 1, float("nan"), float("inf"), "3", True]
                wrong += [allowed.low + 0.5] if allowed.is_integer else []
                wrong += [None] if field.default is not None else []
                yield from ((group, field.name, value) for value in wrong)


@pytest.mark.parametrize(("group", "name", "value"), list(out_of_range()))
def test_values_out_of_range_name_option_value_and_remedy(group, name, value):
    with pytest.raises(UserError) as caught:
        group(**{name: value})
    assert str(caught.value).startswith(f"--{name.replace('_', '-')} is {value!r}: give a")


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 2), ("seed", 0), ("learning_rate", 1), ("momentum", 0.0), ("warmup_epochs", 0)]
)
def test_values_at_the_edge_of_their_range_pass(name, value):
    assert getattr(config.TrainingConfig(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "group"), [("dataset", config.DataConfig), ("workdir", config.RunConfig)])
def test_empty_names_are_refused(name, group):
    with pytest.raises(UserError, match=f"--{name} is ''"):
        group(**{name: ""})


@pytest.mark.parametrize("value", ["", "\0", "a\nb", "\ud800", "x" * 1001, b"name", 3, Path("runs")])
def test_names_that_files_cannot_have_are_refused(value):
    for group, name in ((config.DataConfig, "dataset"), (config.RunConfig, "workdir"), (config.RunConfig, "data_dir")):
        with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} is .*: give a name of 1 to 1000 printable"):
            group(**{name: value})


def test_paths_may_begin_with_the_user_s_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    home = str(tmp_path)
    flags = ["--workdir=~/run", "--data-dir=~", "--cache-dir=~/a/~", "--dataset=folder:~/photos"]
    parsed = parse_train_options(flags)
    assert (parsed.run.workdir, parsed.run.data_dir, parsed.run.cache_dir) == (f"{home}/run", home, f"{home}/a/~")
    assert parsed.data.dataset == f"folder:{home}/photos"
    assert parse_train_options(["--workdir=a/~", "--dataset=~x"]).run.workdir == "a/~"
    (tmp_path / "run").mkdir()
    saved_config.save_config(tmp_path / "run", parsed)
    embed = parse_embed_options(["--workdir=~/run", "--images=~/photos", "--output=~/out.npz"])
    assert (embed.workdir, embed.images, embed.output) == (f"{home}/run", f"{home}/photos", f"{home}/out.npz")
    assert parse_evaluate_options(["--embeddings=~/e"]).embeddings == f"{home}/e"
    runs = parse_evaluations(["--workdir", "~/run", "~/none", "~/run"])
    assert [options.workdir for options in runs] == [f"{home}/run"] * 2
    (tmp_path / "mine.py").write_text("from empssl_jax.config import Config\nconfig = Config()\n")
    assert parse_train_options(["--config=~/mine.py"]) == Config()
    assert ExportOptions("~/run", output="~/w") == ExportOptions(f"{home}/run", output=f"{home}/w")
    assert ImportOptions("~/w.pt", "~/new") == ImportOptions(f"{home}/w.pt", f"{home}/new")
    assert ReportOptions("~/run").run == f"{home}/run"


@pytest.mark.parametrize("options", [{"workdir": ""}, {"embeddings": "a\nb"}, {"cache_dir": "x" * 1001}])
def test_the_options_of_every_command_are_checked(options):
    with pytest.raises(UserError, match=r"^--(workdir|embeddings|cache-dir) is .*: give a name of 1 to 1000 printable"):
        EvaluateOptions(**options)


@pytest.mark.parametrize(
    ("group", "name", "value", "remedy"),
    [
        (config.ModelConfig, "precision", "float16", "'auto' or 'float32' or 'bfloat16'"),
        (config.RunConfig, "remat", 1, "False or True"),
        (config.EvaluationConfig, "untrained", None, "False or True"),
    ],
)
def test_values_that_are_not_a_choice_are_refused_with_the_choices(group, name, value, remedy):
    with pytest.raises(UserError, match=f"^--{name} is {value!r}: give {remedy}"):
        group(**{name: value})


def test_an_eps_that_float32_cannot_compute_is_refused():
    with pytest.raises(UserError, match=r"^--coding-rate-eps is 0.01: give at least 0.02, .* --projection-dim 2000"):
        Config(model=config.ModelConfig(projection_dim=2000), training=config.TrainingConfig(coding_rate_eps=0.01))


def test_pieces_must_divide_the_patches():
    for patches, pieces in ((20, 3), (20, 40), (7, 2)):
        remedy = f"--accumulate is {pieces}: give a number that divides --train-patches, which is {patches}."
        with pytest.raises(UserError, match=f"^{remedy}$"):
            Config(patches=config.PatchConfig(patches), training=config.TrainingConfig(accumulate=pieces))
    assert parse_train_options(["--accumulate=20"]).training.accumulate == 20


def test_runs_of_versions_without_pieces_had_one():
    groups = json.loads(saved_config.to_json(Config()))
    del groups["training"]["accumulate"]
    saved = saved_config.from_json(json.dumps(groups), "config.json")
    assert saved == Config()
    assert training_differences(parse_train_options(["--accumulate=2"]), saved) == ["--accumulate 2 (was 1)"]


def test_warm_up_must_end_before_training_does():
    with pytest.raises(UserError, match=r"--warmup-epochs is 2.0: give less than --max-epochs, which is 2"):
        config.TrainingConfig(max_epochs=2, warmup_epochs=2.0)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_file_survives_json(path):
    loaded = read_config_file(str(path))
    assert saved_config.from_json(saved_config.to_json(loaded), "config.json") == loaded
    assert "empssl train" in path.read_text()


def test_options_override_the_file_which_overrides_the_defaults():
    digits = REPOSITORY / "configs" / "digits.py"
    parsed = parse_train_options(["--config", str(digits), "--batch-size", "64", "--seed=7"])
    assert (parsed.training.batch_size, parsed.training.seed, parsed.data.dataset) == (64, 7, "digits")
    assert parsed.training.learning_rate == config.TrainingConfig().learning_rate


def test_the_flags_and_defaults_of_the_reference():
    flags = "--dataset cifar10 --invariance-coefficient 200 --batch-size 100 --train-patches 20 --valid-patches 128 "
    flags += "--max-epochs 1 --learning-rate 0.3 --weight-decay 1e-4 --projection-dim 1024 --hidden-dim 4096 "
    flags += "--num-neighbours 20 --temperature 0.07 --seed 42"
    assert parse_train_options(flags.split()) == parse_train_options([]) == Config()


def test_help_shows_each_option_with_its_default_in_that_config(capsys):
    with pytest.raises(SystemExit):
        parse_train_options(["--config", str(REPOSITORY / "configs" / "digits.py"), "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for group in GROUPS:
        for field in dataclasses.fields(group):
            assert f"--{field.name.replace('_', '-')}" in shown
    assert "(default: runs/digits)" in shown
    assert "--config FILE" in shown


@pytest.mark.parametrize("parse", [parse_evaluate_options, parse_embed_options])
def test_help_shows_the_values_of_the_run_and_works_without_one(parse, tmp_path, capsys):
    saved_config.save_config(tmp_path, Config(evaluation=config.EvaluationConfig(valid_patches=77)))
    for workdir, patches in ((tmp_path, 77), (tmp_path / "none", config.EvaluationConfig.valid_patches)):
        with pytest.raises(SystemExit) as caught:
            parse(["--help", "--workdir", str(workdir)])
        assert caught.value.code == 0
        assert f"(default: {patches})" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    with pytest.raises(UserError, match=r"has no config\.json"):
        parse(["--workdir", str(tmp_path / "none")])


def test_training_differences_are_those_that_change_what_is_learned():
    ours = Config()
    same = dataclasses.replace(
        ours,
        run=config.RunConfig(workdir="elsewhere", max_to_keep=5),
        evaluation=config.EvaluationConfig(valid_patches=1),
        data=config.DataConfig(test_images_per_class=3),
    )
    assert config.training_differences(ours, same) == []
    before = dataclasses.replace(ours, data=config.DataConfig(train_split="train"))  # version 0.2.0 saved the default
    assert config.training_differences(ours, before) == config.training_differences(before, ours) == []
    other = dataclasses.replace(ours, training=config.TrainingConfig(learning_rate=0.1))
    assert config.training_differences(ours, other) == ["--learning-rate 0.3 (was 0.1)"]


@pytest.mark.parametrize("value", [0.5, (0.5, 0.5), [0.5, 0.5, 0.5], (0.5, 0.5, 1.1), (0.5, 0.5, float("nan")), "0.5"])
def test_channels_are_three_numbers_in_range(value):
    with pytest.raises(UserError, match=r"^--input-mean is .*: give a number from 0 to 1 for each of red, green"):
        config.ModelConfig(input_mean=value)


def test_channels_survive_the_command_line_and_json():
    given = parse_train_options(["--input-mean", "0.1", "0.2", "0.3", "--input-std", "1", "0.5", "0.001"])
    assert (given.model.input_mean, given.model.input_std) == ((0.1, 0.2, 0.3), (1.0, 0.5, 0.001))
    assert saved_config.from_json(saved_config.to_json(given), "config.json") == given
    assert config.training_differences(given, Config()) == [
        "--input-mean 0.1 0.2 0.3 (was 0.5 0.5 0.5)",
        "--input-std 1.0 0.5 0.001 (was 0.5 0.5 0.5)",
    ]
    repeat = "empssl train --workdir runs/again --input-mean 0.1 0.2 0.3 --input-std 1.0 0.5 0.001"
    assert tables.command(given) == repeat


def test_the_user_s_xla_flags_are_kept():
    import subprocess
    import sys

    code = "import os, empssl_jax; print(os.environ['XLA_FLAGS'])"
    for given, expected in [
        ("--xla_cpu_experimental_ynn_fusion_type=x", "--xla_cpu_experimental_ynn_fusion_type=x"),
        ("--a=b", "--a=b --xla_cpu_experimental_ynn_fusion_type="),
    ]:
        printed = subprocess.check_output([sys.executable, "-c", code], env={"XLA_FLAGS": given}, text=True)
        assert printed.strip() == expected


@pytest.mark.parametrize(("crops", "example"), [("random", 128), ("grid", 16), ("grid+whole", 16), ("whole", 1)])
def test_the_example_for_no_patches_is_valid(crops, example):
    remedy = f"^--valid-patches is 0: give the number of patches, such as {example}.$"
    with pytest.raises(UserError, match=remedy):
        config.EvaluationConfig(valid_crops=crops, valid_patches=0).require_patches()
    config.EvaluationConfig(valid_crops=crops, valid_patches=example).require_patches()
