"""Parses the options of each command: those that are not given default to the values of the run that it names."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from empssl_jax.config import Config, EmbeddingConfig
from empssl_jax.config.checked_fields import Checked, expand, path_field
from empssl_jax.config.command_options import RUN, EmbedOptions, EvaluateOptions, ExportOptions
from empssl_jax.config.config_files import first_options
from empssl_jax.config.errors import UserError, counted, require
from empssl_jax.config.pretrained import pretrained_file
from empssl_jax.run_folder.saved_config import CONFIG_FILE, check_not_pretrained, load_config, pretrained_config

HELP = ("-h", "--help")


@dataclass(frozen=True)
class _Workdir(Checked):
    workdir: str = path_field(EvaluateOptions.workdir)
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
    source, _ = first_options(_Workdir, arguments)
    needs_run = is_alone and source.embeddings is None and not asks_for_help(arguments)
    config = _run_defaults(source.workdir, needs_run, _argument(prog)) if source.embeddings is None else Config()
    run = config.run
    default = EvaluateOptions(data_dir=run.data_dir, cache_dir=run.cache_dir, evaluation=config.evaluation)
    description = (
        "Measures the embeddings of a trained encoder by kNN and a linear classifier. Defaults are those of the run."
        f"\n\nExample: {prog} {'runs/a runs/b' if _argument(prog) == RUN else '--workdir runs/cifar10'}"
    )
    return tyro.cli(EvaluateOptions, args=list(arguments), default=default, description=description, prog=prog)


def parse_evaluations(arguments: Sequence[str], prog: str = "empssl eval") -> list[EvaluateOptions]:
    """The options of `eval --workdir RUN [RUN ...] [options]`, for each run.

    If several folders are given, those without a config.json (runs/* may match some) are skipped with a message.

    Raises:
        UserError: none of several folders is a run, or one is the name of a pretrained encoder.
    """
    chosen, rest = (_Workdirs(), []) if asks_for_help(arguments) else first_options(_Workdirs, arguments)
    if len(chosen.workdir) == 1:
        return [parse_evaluate_options(arguments, prog)]
    folders = [expand(folder) for folder in chosen.workdir]
    for folder in folders:
        check_not_pretrained(folder, _argument(prog))
    runs = [folder for folder in folders if (Path(folder) / CONFIG_FILE).is_file()]
    if skipped := sorted(set(folders) - set(runs)):
        print(f"skipping folders that are not runs: {', '.join(skipped)}")
    if not runs:
        named = counted(len(folders), "folder")
        raise UserError(f"{_argument(prog)} names {named}, and none has a {CONFIG_FILE}: give runs.")
    return [parse_evaluate_options([*rest, "--workdir", folder], prog, is_alone=False) for folder in runs]


def _argument(prog: str) -> str:
    """What names a run to `eval` and to `compare`."""
    return RUN if prog.endswith("compare") else "--workdir"


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
