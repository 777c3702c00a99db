"""Compares several runs: a table with mean and standard deviation over the seeds of each config."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from empssl_jax.config import Config
from empssl_jax.config.command_options import EvaluateOptions
from empssl_jax.config.errors import flag
from empssl_jax.config.options import TRAIN
from empssl_jax.evaluation import evaluate
from empssl_jax.evaluation.evaluate import WriteReport
from empssl_jax.run_folder.results import Accuracy, load_results
from empssl_jax.run_folder.saved_config import load_config
from empssl_jax.runtime.atomic_write import atomic_write
from empssl_jax.runtime.distributed import is_first_process

COMPARISON_FILE = "comparison.md"
GROUPING = (
    "Runs that differ only in --seed, or in options that do not change results, share a row: mean ± standard deviation "
    "over n seeds. A row of one seed has no standard deviation."
)


class Measured(NamedTuple):
    """A run and its accuracies, by the name of the measure."""

    folder: Path
    config: Config
    results: dict[str, Accuracy]


def evaluate_all(options: Sequence[EvaluateOptions], write_report: WriteReport) -> None:
    """Evaluates one run, or compares several: evaluates those that need it, then prints and writes a table of all.

    The table is written to comparison.md in the parent folder of the first run. A run is not evaluated again if its
    results.json contains every requested measure and the options agree with the run's own config.

    Args:
        options: those of each run.
        write_report: called at the end of each evaluation whose options ask for a report.
    """
    if len(options) == 1:
        evaluate.evaluate(options[0], write_report)
        return
    runs = []
    for run_options in options:
        folder = Path(run_options.workdir)
        config, results = load_config(folder), _results(run_options)
        if _is_complete(run_options, config, results):
            print(f"{folder} is already evaluated")
        else:
            evaluate.evaluate(run_options, write_report)
            results = _results(run_options)
        runs.append(Measured(folder, dataclasses.replace(config, evaluation=run_options.evaluation), results))
    table = markdown(runs)
    path = Path(options[0].workdir).parent / COMPARISON_FILE
    print(f"\n{table}")
    if is_first_process():
        with atomic_write(path) as file:
            file.write(table.encode())
        print(f"wrote {path}")


def _results(options: EvaluateOptions) -> dict[str, Accuracy]:
    """The run's accuracies on embeddings made as the options say; those that do not record how are included."""
    made = options.evaluation.embeddings
    results = load_results(Path(options.workdir))
    return {name: accuracy for name, accuracy in results.items() if accuracy.get("embeddings", made) == made}


def _is_complete(options: EvaluateOptions, config: Config, results: dict[str, Accuracy]) -> bool:
    """Whether the results contain every requested measure, with the run's own options and its newest checkpoint."""
    as_trained = options.evaluation == config.evaluation and options.step == EvaluateOptions.step
    return as_trained and "kNN" in results and ("linear" in results or config.evaluation.linear_epochs == 0)


def markdown(runs: Sequence[Measured]) -> str:
    """The table, in Markdown: a row for each group of runs that differ only in their seed."""
    groups: dict[Config, list[Measured]] = {}
    for run in runs:
        groups.setdefault(_without_seed(run.config), []).append(run)
    measures = list(dict.fromkeys(name for run in runs for name in run.results))
    varying = _varying(list(groups))
    columns = [f"{name} {k}" for name in measures for k in ("top-1", "top-5")]
    lines = [_row(["runs", "n", "seeds", *columns]), _row(["---"] * (3 + len(columns)))]
    for config, group in groups.items():
        by_seed = {run.config.training.seed: run for run in group}  # repeating a seed adds no sample
        name = ", ".join(f"{option} {value}" for option, value in varying[config].items()) or "all"
        cells = [_mean_and_spread(list(by_seed.values()), m, k) for m in measures for k in ("top1", "top5")]
        lines.append(_row([name, str(len(by_seed)), ", ".join(map(str, sorted(by_seed))), *cells]))
    return "\n".join([*lines, "", GROUPING, ""])


def _mean_and_spread(runs: list[Measured], measure: str, k: str) -> str:
    """Mean ± standard deviation in percent, with the number of runs if some of the row's runs lack the measure."""
    values = [100 * run.results[measure][k] for run in runs if measure in run.results]
    if not values:
        return "-"
    fewer = f" (n = {len(values)})" if len(values) < len(runs) else ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread} %{fewer}"


def _without_seed(config: Config) -> Config:
    """The config without the seed and without the options that do not change results; equal within a group."""
    training = dataclasses.replace(config.training, seed=0)
    evaluation = dataclasses.replace(config.evaluation, report=True)
    data = dataclasses.replace(config.data, train_split=config.data.train_split or TRAIN)
    return Config(data, config.patches, config.model, training, evaluation)


def _varying(configs: Sequence[Config]) -> dict[Config, dict[str, object]]:
    """For each config, its values of the options in which the configs differ."""
    flat = {
        config: {flag(name): value for group in dataclasses.asdict(config).values() for name, value in group.items()}
        for config in configs
    }
    first = next(iter(flat.values()))
    differing = [option for option in first if len({repr(values[option]) for values in flat.values()}) > 1]
    return {config: {option: values[option] for option in differing} for config, values in flat.items()}


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
