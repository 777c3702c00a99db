"""results.json: the accuracies and the effective rank that were measured of a run, by the name of the measure."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from empssl_jax.config import LabelConfig
from empssl_jax.config.errors import UserError, one_line
from empssl_jax.runtime.atomic_write import write_text
from empssl_jax.runtime.distributed import is_first_process

RESULTS_FILE = "results.json"
EFFECTIVE_RANK = "effective rank"  # the name of the measure
# "top1" and "top5" as fractions. An effective rank has "rank" instead, with the numbers of "images" and "dimensions" of
# the embeddings. For runs also "embeddings": how these were made, in words, and "dataset": the name of the data set, if
# it is not the run's own; "label_fraction" and "label_seed", if not all labels were used; and the "options" of the
# measure. The "step" is that of the checkpoint; without it, the result is of the training's end, or of before the
# training. `eval` of given embeddings adds a digest of their "files".
Accuracy = dict[str, Any]


def format_table(results: dict[str, Accuracy]) -> str:
    """Accuracies in percent, then effective ranks, one a line; with the step and the embeddings where these differ."""
    accuracies = {name: value for name, value in results.items() if not is_rank(value)}
    ranks = {name: value for name, value in results.items() if is_rank(value)}
    width = max(map(len, results))
    measured_on = differences(results)
    lines = [f"{'':{width}}   top-1   top-5"] if accuracies else []
    for name, value in (accuracies | ranks).items():
        shown = rank_of(value) if is_rank(value) else f"{100 * value['top1']:5.2f}%  {100 * value['top5']:5.2f}%"
        line = f"{name:{width}}  {shown}"
        lines.append(f"{line}  {measured_on(value)}".rstrip())
    return "\n".join(lines)


def differences(results: dict[str, Accuracy]) -> Callable[[Accuracy], str]:
    """The function that names the step and the embeddings that a result is of, each only if it differs among results.

    Results without a step do not count: they are of the training's end, or of before the training.
    """
    steps = {value["step"] for value in results.values() if "step" in value}
    embeddings = {value.get("embeddings") for value in results.values()}

    def measured_on(value: Accuracy) -> str:
        step = [f"step {value['step']}"] if len(steps) > 1 and "step" in value else []
        made = [value["embeddings"]] if len(embeddings) > 1 and "embeddings" in value else []
        return ": ".join(step + made)

    return measured_on


def is_rank(value: Accuracy) -> bool:
    """Whether the value is an effective rank, as opposed to an accuracy."""
    return "rank" in value


def rank_of(value: Accuracy) -> str:
    """An effective rank in words, with the highest possible one, such as "31.2 of 64"."""
    return f"{value['rank']:.1f} of {min(value['images'], value['dimensions']):,}"


def add_results(folder: Path, results: dict[str, Accuracy]) -> dict[str, Accuracy]:
    """Adds results to the folder's results.json, replacing those of the same name; returns all of them.

    Args:
        folder: folder of the run, or of the embeddings.
        results: accuracies and effective ranks by the name of the measure.
    """
    merged = load_results(folder) | results
    if is_first_process():
        _write(folder, merged)
    return merged


def drop_results(folder: Path, is_outdated: Callable[[Accuracy], bool], reason: str) -> None:
    """Removes outdated results from the folder's results.json, and prints their names and the reason."""
    results = load_results(folder)
    outdated = [name for name, value in results.items() if is_outdated(value)]
    if outdated and is_first_process():
        _write(folder, {name: value for name, value in results.items() if name not in outdated})
        print(f"{folder / RESULTS_FILE} no longer has {reason}: {', '.join(outdated)}")


def _write(folder: Path, results: dict[str, Accuracy]) -> None:
    write_text(folder / RESULTS_FILE, json.dumps(results, indent=2) + "\n")


def recorded(results: dict[str, Accuracy], **how: Any) -> dict[str, Accuracy]:
    """The results, each with how it was measured, such as "embeddings", "step" and "options", unless these are None."""
    known = {name: value for name, value in how.items() if value is not None}
    return {name: value | known for name, value in results.items()}


def of_labels(options: LabelConfig, results: dict[str, Accuracy]) -> dict[str, Accuracy]:
    """The results of measures that learned from the labels that the options choose; unchanged if these are all."""
    chosen = {"label_fraction": options.label_fraction, "label_seed": options.label_seed} if options.labels else {}
    return {measure_name(name, options): accuracy | chosen for name, accuracy in results.items()}


def measure_name(name: str, options: LabelConfig) -> str:
    """The name that results.json gives to a measure: with the fraction of the labels, unless it is all of them."""
    return f"{name}, {options.labels}" if options.labels else name


def on_dataset(name: str | None, results: dict[str, Accuracy]) -> dict[str, Accuracy]:
    """The results on a data set with this name, as results.json has them; unchanged if it is None (the run's own)."""
    if name is None:
        return results
    return {f"{name}: {measure}": accuracy | {"dataset": name} for measure, accuracy in results.items()}


def by_dataset(results: dict[str, Accuracy]) -> dict[str | None, dict[str, Accuracy]]:
    """The results by the name of the measure, for each data set; None for the run's own, which is always there."""
    parts: dict[str | None, dict[str, Accuracy]] = {None: {}}
    for name, accuracy in results.items():
        dataset = accuracy.get("dataset")
        parts.setdefault(dataset, {})[name.removeprefix(f"{dataset}: ")] = accuracy
    return parts


def load_results(folder: Path) -> dict[str, Accuracy]:
    """The results in results.json, empty if there is no such file; raises UserError if it is invalid."""
    path = folder / RESULTS_FILE
    try:
        results = dict(json.loads(path.read_bytes())) if path.exists() else {}
        if results:
            format_table(results)
            by_dataset(results)
            [dict(value.get("options", {})) for value in results.values()]
        return results
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, OSError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{path} cannot be read ({reason}): delete it, or move it elsewhere to keep it.") from error
