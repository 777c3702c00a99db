"""The command `empssl` and its subcommands: each parses its options, imports what it needs, and runs.

Nothing here imports JAX before the options are parsed. This keeps `--help` and errors about options fast.
"""

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tyro

from empssl_jax.config.command_options import EvaluateOptions, FinetuneOptions, ImportOptions, ReportOptions
from empssl_jax.config.config_files import parse_train_options
from empssl_jax.config.errors import UserError, one_line
from empssl_jax.parse_options import (
    HELP,
    parse_compare_options,
    parse_embed_options,
    parse_evaluations,
    parse_export_options,
)
from empssl_jax.runtime.imports import quick_imports
from empssl_jax.runtime.user_errors import MORE_MEMORY, escape_unprintable_characters, user_errors_exit


def main(arguments: Sequence[str] | None = None, prog: str = "empssl") -> None:
    """Runs `empssl COMMAND [options]`. Errors that the user can fix are printed as one sentence and end the process.

    Args:
        arguments: the command and its options; by default those of this process.
        prog: the program's name, shown by --help.
    """
    escape_unprintable_characters()
    name, *options = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    command = COMMANDS.get(name)
    with user_errors_exit(command.memory_remedy if command else MORE_MEMORY):
        if name in HELP:
            print(_overview(prog))
        elif command is None:
            raise UserError(f"{prog} has no command {one_line(name)}: give one of {', '.join(COMMANDS)}.")
        else:
            command.run(options, f"{prog} {name}")


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
    with quick_imports():
        from empssl_jax import training
        from empssl_jax.runtime import distributed

    _keep_memory_and_programs()
    with distributed.processes(config.distributed):
        training.train(config)


def evaluate(arguments: Sequence[str], prog: str) -> None:
    """Measures one run, or compares several."""
    _evaluate(parse_evaluations(arguments, prog))


def compare(arguments: Sequence[str], prog: str) -> None:
    """Compares several runs."""
    _evaluate(parse_compare_options(arguments, prog))


def _evaluate(options: Sequence[EvaluateOptions]) -> None:
    with quick_imports():
        from empssl_jax.evaluation import comparison
        from empssl_jax.report.write_report import try_to_report
        from empssl_jax.runtime import distributed, interruption

    _keep_memory_and_programs()
    with distributed.processes(options[0].distributed):
        interruption.end_at_sigterm()
        comparison.evaluate_all(options, try_to_report)


def embed(arguments: Sequence[str], prog: str) -> None:
    """Embeds a folder of image files."""
    options = parse_embed_options(arguments, prog)
    with quick_imports():
        from empssl_jax.inference import embed_files

    _keep_memory_and_programs()
    embed_files.embed_files(options)


def finetune(arguments: Sequence[str], prog: str) -> None:
    """Fine-tunes a run's encoder on labelled images."""
    description = (
        "Fine-tunes the encoder of a run together with a linear classifier, on the labelled training images or a "
        "fraction of them, and measures both on the test images.\n\n"
        "Example: empssl finetune runs/cifar10 --label-fraction 0.01"
    )
    options = tyro.cli(FinetuneOptions, args=list(arguments), description=description, prog=prog)
    from empssl_jax.finetuning import finetune as finetuning

    _keep_memory_and_programs()
    finetuning.finetune(options)


def export(arguments: Sequence[str], prog: str) -> None:
    """Writes a run's encoder to a file for PyTorch or as ONNX."""
    options = parse_export_options(arguments, prog)
    from empssl_jax.inference.export_weights import export_weights
    from empssl_jax.inference.onnx_export import export_embedder

    (export_embedder if options.format == "onnx" else export_weights)(options)


def import_(arguments: Sequence[str], prog: str) -> None:
    """Creates a run from a file of weights."""
    description = (
        "Creates a run from a file written by `export` or from a checkpoint of the authors' code. The run starts at "
        "step 0 and can be trained further.\n\nExample: empssl import weights.safetensors --workdir runs/imported"
    )
    options = tyro.cli(ImportOptions, args=list(arguments), description=description, prog=prog)
    from empssl_jax.inference.import_weights import import_weights

    import_weights(options)


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
    memory_remedy: str = MORE_MEMORY


LESS_TO_TRAIN = (
    "lower --batch-size, --embedding-batch-size, --train-patches or --width, or give --remat or a higher --accumulate"
)
LESS_TO_FINETUNE = "lower --batch-size or --embedding-batch-size"
LESS_TO_EMBED = "lower --embedding-batch-size"
COMMANDS = {
    "train": Command(train, "train an encoder, or resume its training", LESS_TO_TRAIN),
    "eval": Command(evaluate, "measure a trained encoder by kNN and a linear classifier", LESS_TO_EMBED),
    "embed": Command(embed, "embed image files with a trained encoder", LESS_TO_EMBED),
    "finetune": Command(
        finetune, "fine-tune a trained encoder on labelled images, of which a few can be enough", LESS_TO_FINETUNE
    ),
    "export": Command(export, "write a trained encoder to a file for PyTorch or as ONNX"),
    "import": Command(import_, "create a run from a file of weights"),
    "report": Command(report, "write a run's report, an HTML page"),
    "compare": Command(compare, "measure and compare several runs", LESS_TO_EMBED),
}
