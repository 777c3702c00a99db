"""Compares several runs: a table with mean and standard deviation over the seeds of each config."""

import dataclasses
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from empssl_jax.config import Config, EvaluationConfig
from empssl_jax.config.command_options import EvaluateOptions
from empssl_jax.config.errors import UserError, counted, flag
from empssl_jax.config.options import TRAIN
from empssl_jax.evaluation import evaluate
from empssl_jax.evaluation.evaluate import WriteReport
from empssl_jax.evaluation.measured_images import measured_images
from empssl_jax.run_folder.checkpoints import Checkpoints
from empssl_jax.run_folder.results import Accuracy, by_dataset, load_results, measure_name
from empssl_jax.run_folder.saved_config import load_config, load_saved_images
from empssl_jax.runtime.atomic_write import write_text
from empssl_jax.runtime.distributed import is_first_process

BySeed = dict[int, dict[str, Accuracy]]  # the results of runs that differ only in their seed
COMPARISON_FILE = "comparison.md"
GROUPING = (
    "Runs that differ only in --seed, or in options that do not change results, share a row: mean ± standard deviation "
    "over n seeds. A row of one seed has no standard deviation."
)
CHANGE_NO_RESULT = ("embedding_batch_size", "logistic", "untrained", "report")  # some add one
ONLY_ALIKE = (
    "Compare effective ranks only between runs whose embeddings have the same number of images and the same dimension."
)
UNITS = {"top1": (" top-1", 100, " %"), "top5": (" top-5", 100, " %"), "rank": ("", 1, "")}  # heading, factor, unit


class Measured(NamedTuple):
    """A run and its results, by the name of the measure."""

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

    Raises:
        UserError: a run could not be measured. The table then has the others.
    """
    if len(options) == 1:
        evaluate.evaluate(options[0], write_report)
        return
    runs, failed = [], {}
    for run_options in options:
        try:
            runs.append(_measured(run_options, write_report))
        except BrokenPipeError:  # nothing reads the output any more
            raise
        except (UserError, OSError) as error:  # the other runs are measured all the same
            if jax.process_count() > 1:  # the error may be that of this process alone, and the others wait for it
                raise
            failed[run_options.workdir] = str(error).removesuffix(".")
            print(f"error: {failed[run_options.workdir]}", file=sys.stderr)
    if runs:
        _write(Path(options[0].workdir).parent / COMPARISON_FILE, markdown(_of_the_same_images(runs)))
    if failed:
        reasons = "; ".join(f"{folder} ({reason})" for folder, reason in failed.items())
        raise UserError(f"{len(failed)} of {counted(len(options), 'run')} could not be measured: {reasons}.")


def _measured(options: EvaluateOptions, write_report: WriteReport) -> Measured:
    """A run and its accuracies, which are measured now unless they are complete."""
    folder = Path(options.workdir)
    config, results = load_config(folder), _results(options)
    if _is_complete(options, config, results):
        print(f"{folder} is already evaluated")
    else:
        measured = evaluate.evaluate(options, write_report)
        results = _results(options, next((value["step"] for value in measured.values()), None))
    return Measured(folder, dataclasses.replace(config, evaluation=options.evaluation), results)


def _write(path: Path, table: str) -> None:
    """Writes the table, and prints it even if the disk is full."""
    try:
        if is_first_process():
            write_text(path, table)
    finally:
        print(f"\n{table}")
    print(f"wrote {path}")


def _results(options: EvaluateOptions, step: int | None = None) -> dict[str, Accuracy]:
    """The run's results that were measured at this step as the options say; those that do not record how are included.

    The step is by default that of the newest checkpoint.
    """
    results = load_results(Path(options.workdir))
    if step is None and any("step" in value for value in results.values()):
        step = _newest_step(Path(options.workdir))
    return {name: value for name, value in results.items() if _agrees(value, options.evaluation, step)}


def _agrees(value: Accuracy, evaluation: EvaluationConfig, step: int | None) -> bool:
    """Whether all that a result records of its checkpoint, embeddings and options is as given."""
    expected = {"step": step, "embeddings": evaluation.embeddings}
    return all(value.get(name, one) == one for name, one in expected.items()) and all(
        getattr(evaluation, name, None) == chosen for name, chosen in value.get("options", {}).items()
    )


def _is_complete(options: EvaluateOptions, config: Config, results: dict[str, Accuracy]) -> bool:
    """Whether the results, of the newest checkpoint, contain every requested measure with the run's own options."""
    as_trained = options.evaluation == config.evaluation and options.step == EvaluateOptions.step
    images = measured_images(options.data, config.data, Path(options.workdir))
    there = by_dataset(results).get(images.name, {})
    wanted = {"kNN": True, "linear": config.evaluation.linear_epochs > 0, "logistic": config.evaluation.logistic}
    names = [measure_name(name, config.evaluation) for name, is_wanted in wanted.items() if is_wanted]
    return as_trained and all(name in there for name in names)


def _newest_step(folder: Path) -> int | None:
    with Checkpoints(folder, read_only=True) as checkpoints:
        return checkpoints.latest_step()


def _of_the_same_images(runs: Sequence[Measured]) -> list[Measured]:
    """The runs, those on the same folder of images with the path of the first of them, wherever it was for each."""
    places: dict[str, str] = {}
    found = []
    for folder, config, results in runs:
        if fingerprints := load_saved_images(folder).fingerprints:
            place = places.setdefault(str(sorted(fingerprints.items())), config.data.dataset)
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, dataset=place))
        found.append(Measured(folder, config, results))
    return found


def markdown(runs: Sequence[Measured]) -> str:
    """The table, in Markdown: a row for each data set and each group of runs that differ only in their seed."""
    groups: dict[tuple[Config, str | None], BySeed] = {}
    for run in runs:
        for dataset, results in by_dataset(run.results).items():
            by_seed = groups.setdefault((_without_seed(run.config), dataset), {})
            by_seed[run.config.training.seed] = results  # repeating a seed adds no sample
    columns = _columns(groups.values())
    varying = _varying([config for config, _ in groups])
    headings = [name + UNITS[key][0] for name, key in columns]
    lines = [_row(["runs", "n", "seeds", *headings]), _row(["---"] * (3 + len(columns)))]
    for (config, dataset), by_seed in sorted(groups.items(), key=lambda row: list(varying).index(row[0][0])):
        name = ", ".join(f"{option} {value}" for option, value in varying[config].items()) or "all"
        name += "" if dataset is None else f", measured on {dataset}"
        cells = [_mean_and_spread(list(by_seed.values()), *column) for column in columns]
        lines.append(_row([name, str(len(by_seed)), ", ".join(map(str, sorted(by_seed))), *cells]))
    notes = [GROUPING, *([ONLY_ALIKE] if any(key == "rank" for _, key in columns) else [])]
    return "\n".join([*lines, "", *notes, ""])


def _columns(groups: Iterable[BySeed]) -> list[tuple[str, str]]:
    """The measures and their numbers that some run has, as keys of results.json; effective ranks come last."""
    found = dict.fromkeys(
        (name, key)
        for by_seed in groups
        for results in by_seed.values()
        for name, value in results.items()
        for key in UNITS
        if key in value
    )
    return sorted(found, key=lambda column: column[1] == "rank")


def _mean_and_spread(runs: list[dict[str, Accuracy]], measure: str, key: str) -> str:
    """Mean ± standard deviation, with the number of runs if some of the row's runs lack the measure."""
    _, factor, unit = UNITS[key]
    values = [factor * results[measure][key] for results in runs if key in results.get(measure, {})]
    if not values:
        return "-"
    fewer = f" (n = {len(values)})" if len(values) < len(runs) else ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}{unit}{fewer}"


def _without_seed(config: Config) -> Config:
    """The config without the seed and without the options that do not change results; equal within a group."""
    training = dataclasses.replace(config.training, seed=0)
    same = {name: getattr(EvaluationConfig, name) for name in CHANGE_NO_RESULT}
    evaluation = dataclasses.replace(config.evaluation, **same)
    data = dataclasses.replace(config.data, train_split=config.data.train_split or TRAIN, strict_images=False)
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
