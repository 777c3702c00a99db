"""The command `empssl`: its subcommands, their help, and what they import."""

import dataclasses
import io
import itertools
import json
import re
import subprocess
import sys

import pytest

from empssl_jax import __version__, command_line
from empssl_jax.config import Config, EvaluationConfig
from empssl_jax.config.config_files import parse_train_options
from empssl_jax.config.errors import UserError
from empssl_jax.parse_options import parse_compare_options
from empssl_jax.run_folder.saved_config import save_config

HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "sklearn", "numpy")
COMMANDS = ["train", "eval", "embed", "finetune", "export", "import", "report", "compare"]


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    code = f"""
import json, sys
from empssl_jax.command_line import main
try:
    main({arguments!r})
finally:
    print(json.dumps(sorted(set({HEAVY!r}) & sys.modules.keys())), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == []
    assert "usage: empssl" in done.stdout


def test_imports_run_without_garbage_collections_and_are_skipped_by_later_ones():
    code = """
import gc, sys
from empssl_jax.runtime.imports import quick_imports
for _ in range(2):
    with quick_imports():
        print(gc.isenabled(), end=" ")
        import jax
    print(gc.isenabled(), gc.get_freeze_count() > 10_000, end=" ")
    gc.unfreeze()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True", "True", "True", "False"]


def help_of(*arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.main([*arguments, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_overview_names_every_command(capsys):
    command_line.main([])
    shown = capsys.readouterr().out
    assert list(command_line.COMMANDS) == COMMANDS
    assert all(f"\n  {name} " in shown for name in COMMANDS)


def test_options_stand_in_groups_with_a_heading_each(capsys):
    shown = help_of("train", capsys=capsys)
    groups = ("data", "patches", "model", "training", "evaluation", "run", "distributed")
    places = [shown.index(f"{group} options") for group in groups]
    assert places == sorted(places)
    assert shown.index("--learning-rate") > shown.index("training options") > shown.index("--width")


def test_paragraphs_are_reflowed(capsys):
    """No line of an option's text ends where the first word of the next would still fit."""
    shown = help_of("train", capsys=capsys)
    block = shown[shown.index("--dataset STR") + len("--dataset STR") : shown.index("--train-split ")]
    lines = [line.strip(" │") for line in block.splitlines()[:-1]]
    assert len(lines) > 3
    width = max(map(len, lines))
    for line, following in itertools.pairwise(lines):
        assert len(line) + 1 + len(following.split()[0]) > width - 3, line


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example(name, capsys):
    assert f"Example: empssl {name} " in help_of(name, capsys=capsys)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        (
            "eval",
            [
                "The images to learn from and to measure on.",
                "How images are embedded and embeddings measured.",
                "The processes of",
            ],
        ),
        ("compare", ["The images to learn from and to measure on.", "How images are embedded and", "The processes of"]),
        ("embed", ["How images are embedded."]),
        ("finetune", ["Which labels classifiers learn from.", "The images to learn from and"]),
        ("export", ["For --format onnx only."]),
    ],
)
def test_each_group_of_options_has_its_own_text(name, groups, capsys):
    """Not the comment of the option that stands above the group."""
    shown = [line.strip("-─│╭╮ ") for line in help_of(name, capsys=capsys).splitlines()]
    lines = [line for line in shown if line]
    texts = [text for title, text in itertools.pairwise(lines) if re.fullmatch(r"\w+ options", title)]
    assert [text[: len(group)] for text, group in zip(texts, groups, strict=True)] == groups


def test_the_help_of_train_says_what_it_measures_and_what_it_only_saves(capsys):
    shown = " ".join(help_of("train", capsys=capsys).split("Example:")[0].split())
    assert "Trains an EMP-SSL encoder, embeds the images, and measures kNN and the effective rank." in shown
    assert "linear classifier and of logistic regression are saved with the run for empssl eval." in shown


@pytest.mark.parametrize(("command", "has_it"), [("eval", True), ("compare", True), ("finetune", False)])
def test_only_commands_that_measure_knn_speak_of_it(command, has_it, capsys):
    assert ("kNN" in help_of(command, capsys=capsys)) == has_it


@pytest.mark.parametrize("name", command_line.COMMANDS)
def test_too_little_memory_names_options_that_the_command_has(name, capsys, monkeypatch):
    def run(arguments, prog):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setitem(command_line.COMMANDS, name, command_line.COMMANDS[name]._replace(run=run))
        with pytest.raises(SystemExit):
            command_line.main([name])
    named = re.findall("--[a-z-]+", capsys.readouterr().err)
    assert ("--embedding-batch-size" in named) == (name not in ("export", "import", "report"))
    options = re.findall("--[a-z-]+", help_of(name, capsys=capsys))
    assert set(named) <= set(options)


def test_an_unknown_command_is_refused_with_the_commands(capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.main(["trian"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said == f"error: empssl has no command 'trian': give one of {', '.join(COMMANDS)}.\n"


@pytest.mark.parametrize("command", ["report", "export", "compare", "finetune"])
def test_a_run_without_an_option_is_named_without_one(command, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.main([command, str(tmp_path / "none")])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: RUN {tmp_path}/none has no config.json: give the folder of a run.\n"


@pytest.mark.parametrize("command", ["report", "export", "compare", "finetune", "eval"])
def test_exported_weights_are_not_taken_for_a_run(command, tmp_path, capsys):
    weights = tmp_path / "w.safetensors"
    weights.touch()
    with pytest.raises(SystemExit) as ended:
        command_line.main([command, *(["--workdir"] if command == "eval" else []), str(weights)])
    assert ended.value.code == 2
    argument = "--workdir" if command == "eval" else "RUN"
    remedy = f"if it holds weights, `empssl import {weights} --workdir RUN` makes one"
    assert capsys.readouterr().err == f"error: {argument} {weights} is a file, not the folder of a run: {remedy}.\n"


def test_an_unknown_config_is_refused_with_those_there_are(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["train", "--config", "nope"])
    said = capsys.readouterr().err
    assert said.startswith(
        "error: --config nope cannot be used (there is no such file): give a file, or one of cifar10,"
    )
    assert said.endswith(", digits, imagenet100, tiny_imagenet.\n")


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", rb"\xe9, \u4e2d, \udcff"),
        ("latin-1", b"\xe9, \\u4e2d, \\udcff"),
        ("utf-8", "\xe9, \u4e2d, \\udcff".encode()),
    ],
)
def test_names_that_the_terminal_cannot_show_are_escaped(encoding, shown, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit):
        command_line.main(["compare", "\xe9", "\u4e2d", "\udcff"])
    out.flush()
    assert out.buffer.getvalue() == b"skipping folders that are not runs: " + shown + b"\n"


def test_the_help_of_compare_is_about_several_runs(capsys):
    shown = " ".join(help_of("compare", capsys=capsys).replace("│", " ").split())
    assert shown.startswith("usage: empssl compare [-h] [OPTIONS] RUN [RUN ...] Compares runs: ")
    assert "--workdir" not in shown
    assert "--embeddings" not in shown


@pytest.mark.parametrize(
    "arguments",
    [["a", "b", "--whiten", "--step=best"], ["--step", "best", "--whiten", "a", "b"], ["--cells=2", "a", "b"]],
)
def test_compare_takes_runs_before_or_after_options(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grids = [EvaluationConfig(valid_crops="grid", valid_patches=patches) for patches in (16, 36)]
    for name, evaluation in zip("ab", grids, strict=True):
        (tmp_path / name).mkdir()
        save_config(tmp_path / name, Config(evaluation=evaluation))
    parsed = parse_compare_options(arguments)
    assert [options.workdir for options in parsed] == ["a", "b"]
    changed = {"cells": 2} if "--cells=2" in arguments else {"whiten": True}
    assert [options.evaluation for options in parsed] == [dataclasses.replace(grid, **changed) for grid in grids]
    assert {options.step for options in parsed} == {"best" if "whiten" in changed else "latest"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--workdir a b", "empssl compare has no option --workdir: give the runs without it, such as empssl compare"),
        ("a --workdir=b", "empssl compare has no option --workdir: give the runs without it, such as empssl compare"),
        ("a --step best b", "RUN b stands apart from the other runs: give all runs first, then the options"),
        ("--whiten", "empssl compare names no run: give folders of runs, such as empssl compare runs/a runs/b"),
        ("", "empssl compare names no run: give folders of runs, such as empssl compare runs/a runs/b"),
    ],
)
def test_compare_says_where_runs_belong(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.main(["compare", *arguments.split()])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_the_configs_of_the_package_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name = parse_train_options(["--config", "digits"])
    assert by_name == parse_train_options(["--config", "configs/digits.py"])
    assert by_name.data.dataset == "digits"
    assert parse_train_options([]) == Config()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits.py").write_text("from empssl_jax.config import Config\nconfig = Config()\n")
    assert parse_train_options(["--config", "configs/digits.py"]) == Config()  # a file of the user's comes first
    (tmp_path / "configs" / "cifar10.py").write_text("raise SystemExit('run')")
    assert parse_train_options([]) == Config()  # but only one that the option names
    with pytest.raises(UserError, match=r"^--config configs/cifar10\.py cannot be used \(SystemExit: run\)"):
        parse_train_options(["--config", "configs/cifar10.py"])
    (tmp_path / "digits").mkdir()  # such as a folder of images
    assert parse_train_options(["--config", "digits"]) == by_name


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert __version__ == version("empssl_jax")
