"""The report's tables, and the formatting of its numbers."""

import dataclasses
import math
import re
import shlex
from typing import Any, NamedTuple

import markupsafe
import numpy as np
from jaxtyping import Int

from empssl_jax.config import Config
from empssl_jax.config.errors import flag, words
from empssl_jax.data.datasets import spread
from empssl_jax.report.run import Run
from empssl_jax.run_folder.results import Accuracy, by_dataset, differences, is_rank, rank_of

TABLE_ROWS = 21
WORST_PAIRS = 20


class ClassRow(NamedTuple):
    """The kNN accuracy of a class."""

    name: str
    images: int  # number of test images
    accuracy: float
    mistaken_for: str  # the most frequent wrong prediction, "" if there is none
    counts: list[int]  # predictions of each class


def percent(fraction: float | None) -> str:
    """A fraction in percent; "-" if it is unknown."""
    return "-" if fraction is None or not math.isfinite(fraction) else f"{100 * fraction:.1f} %"


def flags(text: str) -> markupsafe.Markup:
    """Marks up the options in a text, such as --seed, as code without line breaks."""
    return markupsafe.Markup(
        re.sub(r"--[a-z][a-z-]*", r'<code class="flag">\g<0></code>', str(markupsafe.escape(text)))
    )


def duration(seconds: float) -> str:
    """Seconds in readable units, such as 3 min 20 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = divmod(round(seconds), 60), divmod(round(seconds / 60), 60)
    return f"{minutes[0]} min {minutes[1]} s" if seconds < 3600 else f"{hours[0]} h {hours[1]} min"


def numbers(run: Run) -> list[list[str]]:
    """Rows of the table behind the curves: step, loss, coding rate, similarity, learning rate, throughput, seconds."""
    metrics = run.metrics
    return [
        [
            f"{run.steps[i]:,.0f}",
            f"{metrics['loss'][i]:.2f}",
            percent(metrics["coding_rate_fraction"][i]),
            f"{metrics['similarity'][i]:.4f}",
            f"{metrics['learning_rate'][i]:.4g}",
            f"{metrics['throughput'][i]:,.0f}" if math.isfinite(metrics["throughput"][i]) else "-",
            f"{metrics['seconds'][i]:,.1f}" if math.isfinite(metrics["seconds"][i]) else "-",
        ]
        for i in spread(len(run.steps), TABLE_ROWS)
    ]


def results_by_dataset(results: dict[str, Accuracy]) -> list[tuple[str | None, list[tuple[str, list[str]]]]]:
    """Each data set, None for the run's own, with its rows: the measure, then top-1 and top-5 or the effective rank.

    Where the step or the embeddings of the results differ, they stand behind the measure.
    """
    measured_on = differences(results)

    def row(name: str, value: Accuracy) -> tuple[str, list[str]]:
        return (f"{name} ({differing})" if (differing := measured_on(value)) else name), _cells(value)

    return [
        (dataset, [row(*result) for result in sorted(measures.items(), key=lambda result: is_rank(result[1]))])
        for dataset, measures in by_dataset(results).items()
        if measures
    ]


def _cells(value: Accuracy) -> list[str]:
    return [rank_of(value)] if is_rank(value) else [percent(value["top1"]), percent(value["top5"])]


def class_rows(confusion: Int[np.ndarray, "C C"], names: list[str]) -> list[ClassRow]:
    """One row per class, from a confusion matrix of class by predicted class."""
    rows = []
    for number, counts in enumerate(confusion):
        total, mistakes = int(counts.sum()), np.where(np.arange(len(counts)) == number, 0, counts)
        mistaken = names[int(np.argmax(mistakes))] if mistakes.any() else ""
        accuracy = counts[number] / total if total else math.nan
        rows.append(ClassRow(names[number], total, float(accuracy), mistaken, counts.tolist()))
    return rows


def worst_pairs(confusion: Int[np.ndarray, "C C"], names: list[str]) -> list[tuple[str, str, int]]:
    """The most frequent mistakes: class, predicted class, number of images."""
    mistakes = confusion * (1 - np.eye(len(confusion), dtype=int))
    order = np.argsort(-mistakes, axis=None, kind="stable")[:WORST_PAIRS]
    pairs = [np.unravel_index(index, mistakes.shape) for index in order]
    return [(names[i], names[j], int(mistakes[i, j])) for i, j in pairs if mistakes[i, j] > 0]


def options(config: Config) -> list[tuple[str, Any, bool]]:
    """Each option, its value, and whether it differs from the default."""
    found = []
    for group in dataclasses.fields(config):
        if group.name != "distributed":
            values, defaults = (getattr(source, group.name) for source in (config, Config()))
            for field in dataclasses.fields(values):
                value = getattr(values, field.name)
                found.append((flag(field.name), value, value != getattr(defaults, field.name)))
    return found


def command(config: Config) -> str:
    """The command that repeats the run in another folder, without a config file."""
    line = ["empssl", "train", "--workdir", "runs/again"]
    for name, value, differs in options(config):
        if name == "--workdir":
            continue
        if differs and isinstance(value, bool):
            line.append(name if value else name.replace("--", "--no-", 1))
        elif differs:
            line += [name, *words(value)]
    return shlex.join(line)
