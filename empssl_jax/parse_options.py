"""Parses the options of each command: those that are not given default to the values of the run that it names."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from empssl_jax.config import Config, EmbeddingConfig, EvaluationConfig
from empssl_jax.config.checked_fields import Checked, expand, path_field
from empssl_jax.config.command_options import RUN, CompareOptions, EmbedOptions, EvaluateOptions, ExportOptions
from empssl_jax.config.config_files import first_options
from empssl_jax.config.errors import UserError, counted, require
from empssl_jax.config.pretrained import pretrained_file
from empssl_jax.run_folder.saved_config import CONFIG_FILE, check_not_pretrained, load_config, pretrained_config

HELP = ("-h", "--help")


@dataclass(frozen=True)
class _Workdir(Checked):
    workdir: str = path_field(EvaluateOptions.workdir)


@dataclass(frozen=True)
class _WorkdirOrEmbeddings(_Workdir):
    embeddings: str | None = None


@dataclass(frozen=True)
class _Workdirs:
    workdir: tuple[str, ...] = (EvaluateOptions.workdir,)


def parse_evaluate_options(
    arguments: Sequence[str], prog: str = "empssl eval", is_alone: bool = True
) -> EvaluateOptions:
    """The options of `eval` for one run. Options that are not given default to the values of the run in --workdir.

    Raises:
        UserError: there is no valid run in --workdir. Unless the run `is_alone`, this is left to its evaluation.
    """
    source, _ = first_options(_WorkdirOrEmbeddings, arguments)
    needs_run = is_alone and source.embeddings is None and not asks_for_help(arguments)
    config = _run_defaults(source.workdir, needs_run) if source.embeddings is None else Config()
    run = config.run
    default = EvaluateOptions(data_dir=run.data_dir, cache_dir=run.cache_dir, evaluation=config.evaluation)
    description = (
        "Measures the embeddings of a trained encoder by kNN and a linear classifier. Defaults are those of the run."
        f"\n\nExample: {prog} --workdir runs/cifar10"
    )
    return tyro.cli(EvaluateOptions, args=list(arguments), default=default, description=description, prog=prog)


def parse_evaluations(arguments: Sequence[str], prog: str = "empssl eval") -> list[EvaluateOptions]:
    """The options of `eval --workdir RUN [RUN ...] [options]`, for each run.

    Raises:
        UserError: there is no valid run in --workdir, or, with several folders, see `_runs_among`.
    """
    chosen, rest = (_Workdirs(), []) if asks_for_help(arguments) else first_options(_Workdirs, arguments)
    if len(chosen.workdir) == 1:
        return [parse_evaluate_options(arguments, prog)]
    runs = _runs_among(chosen.workdir, "--workdir")
    options = [parse_evaluate_options([*rest, "--workdir", folder], prog, is_alone=False) for folder in runs]
    given, remedy = options[0].embeddings, "they are measured as they are, so leave out --workdir, or --embeddings"
    require(given is None, "embeddings", given, remedy)
    return options


@dataclass(frozen=True)
class _UncheckedEvaluation(EvaluationConfig):
    def __post_init__(self) -> None:
        """Accepts options that are valid only together with those of a run."""


@dataclass(frozen=True)
class _ComparedRuns(CompareOptions):
    evaluation: OmitArgPrefixes[_UncheckedEvaluation] = dataclasses.field(default_factory=_UncheckedEvaluation)


def parse_compare_options(arguments: Sequence[str], prog: str = "empssl compare") -> list[CompareOptions]:
    """The options of `compare RUN [RUN ...] [options]`, for each run: those that are not given are the run's.

    Raises:
        UserError: no run is named, runs follow --workdir or stand on both sides of an option, or see `_runs_among`.
    """
    named, rest = first_options(_ComparedRuns, arguments)  # all options, since the runs are what none of them takes
    options = [word for word in rest if word.startswith("-")]
    if asks_for_help(arguments):
        runs = list(named.runs[:1]) or [CompareOptions.workdir]
    elif "--workdir" in [option.split("=")[0] for option in options]:
        raise UserError(f"{prog} has no option --workdir: give the runs without it, such as {prog} runs/a runs/b.")
    elif not named.runs:
        raise UserError(f"{prog} names no run: give folders of runs, such as {prog} runs/a runs/b.")
    elif rest and not options:
        raise UserError(f"{RUN} {rest[0]} stands apart from the other runs: give all runs first, then the options.")
    else:
        runs = _runs_among(named.runs, RUN)
    return [_parse_compare_options(arguments, prog, folder, is_alone=len(named.runs) == 1) for folder in runs]


def _parse_compare_options(arguments: Sequence[str], prog: str, folder: str, is_alone: bool) -> CompareOptions:
    """The options of `compare` for the run in `folder`. Unless it `is_alone`, errors are left to its evaluation."""
    config = _run_defaults(folder, is_alone and not asks_for_help(arguments), RUN)
    run = config.run
    default = CompareOptions(folder, data_dir=run.data_dir, cache_dir=run.cache_dir, evaluation=config.evaluation)
    description = (
        "Compares runs: measures those without complete results, prints a table and writes comparison.md beside them. "
        f"Defaults are those of each run.\n\nExample: {prog} runs/a runs/b"
    )
    return tyro.cli(CompareOptions, args=list(arguments), default=default, description=description, prog=prog)


def _runs_among(folders: Sequence[str], argument: str) -> list[str]:
    """The folders with a config.json; prints the others, which runs/* may match. A single folder is not looked into.

    Raises:
        UserError: none of several folders is a run, or one is the name of a pretrained encoder.
    """
    folders = [expand(folder) for folder in folders]
    if len(folders) == 1:
        return folders
    for folder in folders:
        check_not_pretrained(folder, argument)
    runs = [folder for folder in folders if (Path(folder) / CONFIG_FILE).is_file()]
    if skipped := sorted(set(folders) - set(runs)):
        print(f"skipping folders that are not runs: {', '.join(skipped)}")
    if not runs:
        named = counted(len(folders), "folder")
        raise UserError(f"{argument} names {named}, and none has a {CONFIG_FILE}: give runs.")
    return runs


def parse_embed_options(arguments: Sequence[str], prog: str | None = None) -> EmbedOptions:
    """The options of `embed`. Options that are not given default to the values of the run's evaluation."""
    source, _ = first_options(_Workdir, arguments)
    file = pretrained_file(source.workdir)
    run = pretrained_config(file) if file else _run_defaults(source.workdir, not asks_for_help(arguments))
    evaluation = run.evaluation
    default = EmbedOptions(
        images=tyro.MISSING,
        embedding_batch_size=evaluation.embedding_batch_size,
        embedding=evaluation.embedding,
    )
    description = (
        "Embeds image files with a trained encoder. Files are processed in parts, kept in OUTPUT.parts until all are "
        "done; rerunning the command resumes, with bit-identical embeddings. Defaults are those of the run's "
        "evaluation.\n\nExample: empssl embed --workdir runs/cifar10 --images photos --output photos.npz"
    )
    return tyro.cli(EmbedOptions, args=list(arguments), default=default, description=description, prog=prog)


@dataclass(frozen=True)
class _UncheckedEmbedding(EmbeddingConfig):
    def __post_init__(self) -> None:
        """Accepts options that are valid only together with those of the run."""


@dataclass(frozen=True)
class _ExportedRun(ExportOptions):
    run: Positional[str] = ""
    embedding: OmitArgPrefixes[_UncheckedEmbedding] = dataclasses.field(default_factory=_UncheckedEmbedding)

    def __post_init__(self) -> None:
        """Nothing is checked yet."""


def parse_export_options(arguments: Sequence[str], prog: str = "empssl export") -> ExportOptions:
    """The options of `export`. Those of the embedding default to the values of the run's evaluation.

    Raises:
        UserError: options of the embedding are given for a file that holds weights only.
    """
    source, _ = first_options(_ExportedRun, arguments)  # all options, since the run is what none of them takes
    run = _run_defaults(expand(source.run), not asks_for_help(arguments), RUN) if source.run else Config()
    default = ExportOptions(run=tyro.MISSING, embedding=run.evaluation.embedding)
    description = (
        "Writes the encoder of a run to a file: its weights for PyTorch, or the whole computation from images to "
        "embeddings as ONNX.\n\nExample: empssl export runs/cifar10"
    )
    options = tyro.cli(ExportOptions, args=list(arguments), default=default, description=description, prog=prog)
    if options.format != "onnx":
        for name, value in dataclasses.asdict(options.embedding).items():
            remedy = f"a file of format {options.format} holds weights only, so leave it out or give --format onnx"
            require(value == getattr(default.embedding, name), name, value, remedy)
    return options


def _run_defaults(workdir: str, needs_run: bool, argument: str = "--workdir") -> Config:
    """The config of a run. If it cannot be loaded: UserError if the run is needed, else the default config."""
    try:
        return load_config(Path(workdir), argument)
    except (UserError, OSError):
        if needs_run:
            raise
        return Config()


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether the arguments contain --help or -h."""
    return not set(HELP).isdisjoint(arguments)
