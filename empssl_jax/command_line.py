"""The command `empssl` and its subcommands: each parses its options, imports what it needs, and runs.

Nothing here imports JAX before the options are parsed. This keeps `--help` and errors about options fast.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from empssl_jax.config import Config, EmbeddingConfig
from empssl_jax.config.checked_fields import Checked, expand, path_field
from empssl_jax.config.command_options import (
    RUN,
    EmbedOptions,
    EvaluateOptions,
    ExportOptions,
    ImportOptions,
    ReportOptions,
)
from empssl_jax.config.config_files import first_options, parse_train_options
from empssl_jax.config.errors import UserError, one_line, require
from empssl_jax.run_folder.saved_config import CONFIG_FILE, load_config
from empssl_jax.runtime.user_errors import escape_unprintable_characters, user_errors_exit

HELP = ("-h", "--help")


def main(arguments: Sequence[str] | None = None, prog: str = "empssl") -> None:
    """Runs `empssl COMMAND [options]`. Errors that the user can fix are printed as one sentence and end the process.

    Args:
        arguments: the command and its options; by default those of this process.
        prog: the program's name, shown by --help.
    """
    escape_unprintable_characters()
    name, *options = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    with user_errors_exit():
        if name in HELP:
            print(_overview(prog))
        elif name not in COMMANDS:
            raise UserError(f"{prog} has no command {one_line(name)}: give one of {', '.join(COMMANDS)}.")
        else:
            COMMANDS[name].run(options, f"{prog} {name}")


def _overview(prog: str) -> str:
    rows = "\n".join(f"  {name:9}{command.summary}" for name, command in COMMANDS.items())
    return f"usage: {prog} COMMAND [options]\n\ncommands:\n{rows}\n\n{prog} COMMAND --help lists a command's options."


def _keep_memory_and_programs() -> None:
    """What every command that computes does first."""
    from empssl_jax.runtime import compilation, memory

    memory.keep_freed_memory()
    compilation.keep_compiled_programs()


def train(arguments: Sequence[str], prog: str) -> None:
    """Trains or resumes a run."""
    config = parse_train_options(arguments, prog)
    from empssl_jax import training
    from empssl_jax.runtime import distributed

    _keep_memory_and_programs()
    with distributed.processes(config.distributed):
        training.train(config)


def evaluate(arguments: Sequence[str], prog: str) -> None:
    """Measures one run, or compares several."""
    options = parse_evaluations(arguments, prog)
    from empssl_jax.evaluation import comparison
    from empssl_jax.report.write_report import try_to_report
    from empssl_jax.runtime import distributed, interruption

    _keep_memory_and_programs()
    with distributed.processes(options[0].distributed):
        interruption.end_at_sigterm()
        comparison.evaluate_all(options, try_to_report)


def compare(arguments: Sequence[str], prog: str) -> None:
    """Like `evaluate`, with the runs as positional arguments."""
    runs = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    if not (runs or asks_for_help(arguments)):
        raise UserError(f"{prog} names no run: give folders of runs, such as {prog} runs/a runs/b.")
    evaluate(["--workdir", *arguments] if runs else arguments, prog)


def embed(arguments: Sequence[str], prog: str) -> None:
    """Embeds a folder of image files."""
    options = parse_embed_options(arguments, prog)
    from empssl_jax.inference import embed_files

    _keep_memory_and_programs()
    embed_files.embed_files(options)


def export_weights(arguments: Sequence[str], prog: str) -> None:
    """Writes a run's encoder to a file for PyTorch or as ONNX."""
    options = parse_export_options(arguments, prog)
    from empssl_jax.inference import onnx_export, weights

    export = onnx_export.export_embedder if options.format == "onnx" else weights.export_weights
    export(options)


def import_weights(arguments: Sequence[str], prog: str) -> None:
    """Creates a run from a file of weights."""
    description = (
        "Creates a run from a file written by `export` or from a checkpoint of the authors' code. The run starts at "
        "step 0 and can be trained further.\n\nExample: empssl import weights.safetensors --workdir runs/imported"
    )
    options = tyro.cli(ImportOptions, args=list(arguments), description=description, prog=prog)
    from empssl_jax.inference import weights

    weights.import_weights(options)


def report(arguments: Sequence[str], prog: str) -> None:
    """Writes a run's report."""
    description = "Writes RUN/report.html, a page of figures and explanations.\n\nExample: empssl report runs/cifar10"
    options = tyro.cli(ReportOptions, args=list(arguments), description=description, prog=prog)
    from empssl_jax.report.write_report import report_run

    report_run(options)


class Command(NamedTuple):
    """A subcommand."""

    run: Callable[[Sequence[str], str], None]  # takes the options and the program's name
    summary: str


COMMANDS = {
    "train": Command(train, "train an encoder, or resume its training"),
    "eval": Command(evaluate, "measure a trained encoder by kNN and a linear classifier"),
    "embed": Command(embed, "embed image files with a trained encoder"),
    "export": Command(export_weights, "write a trained encoder to a file for PyTorch or as ONNX"),
    "import": Command(import_weights, "create a run from a file of weights"),
    "report": Command(report, "write a run's report, an HTML page"),
    "compare": Command(compare, "measure and compare several runs"),
}


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
        UserError: none of several folders is a run.
    """
    chosen, rest = (_Workdirs(), []) if asks_for_help(arguments) else first_options(_Workdirs, arguments)
    if len(chosen.workdir) == 1:
        return [parse_evaluate_options(arguments, prog)]
    folders = [expand(folder) for folder in chosen.workdir]
    runs = [folder for folder in folders if (Path(folder) / CONFIG_FILE).is_file()]
    if skipped := sorted(set(folders) - set(runs)):
        print(f"skipping folders that are not runs: {', '.join(skipped)}")
    if not runs:
        raise UserError(f"{_argument(prog)} names {len(folders)} folders, and none has a {CONFIG_FILE}: give runs.")
    return [parse_evaluate_options([*rest, "--workdir", folder], prog, is_alone=False) for folder in runs]


def _argument(prog: str) -> str:
    """What names a run to `eval` and to `compare`."""
    return RUN if prog.endswith("compare") else "--workdir"


def parse_embed_options(arguments: Sequence[str], prog: str | None = None) -> EmbedOptions:
    """The options of `embed`. Options that are not given default to the values of the run's evaluation."""
    source, _ = first_options(_Workdir, arguments)
    evaluation = _run_defaults(source.workdir, not asks_for_help(arguments)).evaluation
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
        """Options that fit together only with those of the run are accepted."""


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
