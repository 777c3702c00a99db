"""Several runs side by side: mean and spread over those that differ only in their seed."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from empssl_jax.config import Config
from empssl_jax.config.command_options import EvaluateOptions
from empssl_jax.config.errors import flag
from empssl_jax.evaluation import evaluate
from empssl_jax.evaluation.evaluate import WriteReport
from empssl_jax.run_folder.results import Accuracy, load_results
from empssl_jax.run_folder.saved_config import load_config
from empssl_jax.runtime.atomic_write import atomic_write
from empssl_jax.runtime.distributed import is_first_process

COMPARISON_FILE = "comparison.md"
GROUPING = (
    "Runs that differ only in --seed (and in where they live) are one row: mean ± standard deviation over n seeds; "
    "a row of one seed has no spread."
)


class Measured(NamedTuple):
    """A run and its accuracies."""

    folder: Path
    config: Config
    results: dict[str, Accuracy]


def evaluate_all(options: Sequence[EvaluateOptions], write_report: WriteReport) -> None:
    """Evaluates one run; of several reads or evaluates each, and prints and writes a table of all.

    The table goes into comparison.md of the folder above the first run. A run is read if results.json has all that is
    asked for, and no option says otherwise than the run's own config.
    """
    if len(options) == 1:
        evaluate.evaluate(options[0], write_report)
        return
    runs = []
    for one in options:
        folder = Path(one.workdir)
        config, results = load_config(folder), _results(one)
        if _is_complete(one, config, results):
            print(f"{folder} has its results")
        else:
            evaluate.evaluate(one, write_report)
            results = _results(one)
        runs.append(Measured(folder, dataclasses.replace(config, evaluation=one.evaluation), results))
    table = markdown(runs)
    path = Path(options[0].workdir).parent / COMPARISON_FILE
    print(f"\n{table}")
    if is_first_process():
        with atomic_write(path) as file:
            file.write(table.encode())
        print(f"wrote {path}")


def _results(options: EvaluateOptions) -> dict[str, Accuracy]:
    """What has been measured of a run's embeddings, made as the options say."""
    made = options.evaluation.embeddings
    results = load_results(Path(options.workdir))
    return {name: accuracy for name, accuracy in results.items() if accuracy.get("embeddings", made) == made}


def _is_complete(options: EvaluateOptions, config: Config, results: dict[str, Accuracy]) -> bool:
    as_trained = options.evaluation == config.evaluation and options.step == EvaluateOptions.step
    return as_trained and "kNN" in results and ("linear" in results or config.evaluation.linear_epochs == 0)


def markdown(runs: Sequence[Measured]) -> str:
    """The table: a row for each group of runs that differ only in their seed."""
    groups: dict[Config, list[Measured]] = {}
    for run in runs:
        groups.setdefault(_without_seed(run.config), []).append(run)
    measures = list(dict.fromkeys(name for run in runs for name in run.results))
    varying = _varying(list(groups))
    columns = [f"{name} {k}" for name in measures for k in ("top-1", "top-5")]
    lines = [_row(["runs", "n", "seeds", *columns]), _row(["---"] * (3 + len(columns)))]
    for config, group in groups.items():
        by_seed = {run.config.training.seed: run for run in group}  # the same seed twice is no second sample
        name = ", ".join(f"{option} {value}" for option, value in varying[config].items()) or "all"
        cells = [_mean_and_spread(list(by_seed.values()), m, k) for m in measures for k in ("top1", "top5")]
        lines.append(_row([name, str(len(by_seed)), ", ".join(map(str, sorted(by_seed))), *cells]))
    return "\n".join([*lines, "", GROUPING, ""])


def _mean_and_spread(runs: list[Measured], measure: str, k: str) -> str:
    """In percent; of fewer runs than the row has, how many there are."""
    values = [100 * run.results[measure][k] for run in runs if measure in run.results]
    if not values:
        return "-"
    fewer = f" (n = {len(values)})" if len(values) < len(runs) else ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread} %{fewer}"


def _without_seed(config: Config) -> Config:
    """What a run's group has in common: all that decides its numbers but the seed."""
    training = dataclasses.replace(config.training, seed=0)
    evaluation = dataclasses.replace(config.evaluation, report=True)
    return Config(config.data, config.patches, config.model, training, evaluation)


def _varying(configs: Sequence[Config]) -> dict[Config, dict[str, object]]:
    """The options in which the configs differ, by config."""
    flat = {
        config: {flag(name): value for group in dataclasses.asdict(config).values() for name, value in group.items()}
        for config in configs
    }
    differ = [option for option in next(iter(flat.values())) if len({repr(one[option]) for one in flat.values()}) > 1]
    return {config: {option: one[option] for option in differ} for config, one in flat.items()}


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
