"""Remarks on what is unusual about a run, most with a suggestion."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from empssl_jax.config.errors import counted
from empssl_jax.evaluation.effective_rank import Spectrum
from empssl_jax.report.findings import Findings, margin
from empssl_jax.report.run import Run
from empssl_jax.report.tables import percent

COLLAPSED_RATE = 0.05  # as a fraction of the range of possible coding rates
COLLAPSED_SIMILARITY = 0.99
FEW_STEPS = 100
MANY_DIRECTIONS = 5  # with fewer, a low effective rank means little
WIDE_MARGIN = 0.02


class Remark(NamedTuple):
    """One observation: a warning if something went wrong, else a note on how far to trust the numbers."""

    warns: bool
    text: str


def remarks(run: Run, findings: Findings | None, spectrum: Spectrum | None) -> list[Remark]:
    """All remarks about a run, warnings first."""
    found = [
        *_about_training(run),
        *_about_spectrum(spectrum),
        *_about_predictions(run, findings),
        *_about_measures(run, findings),
    ]
    return sorted(found, key=lambda remark: not remark.warns)


def _about_training(run: Run) -> Iterator[Remark]:
    steps = len(run.steps)
    if steps == 0:
        yield Remark(True, "There are no metrics: training has not begun.")
        return
    done = int(run.steps[-1]) + 1
    if run.last_step is not None and done < run.last_step:
        yield Remark(
            True,
            f"Training is incomplete: {done:,} of {run.last_step:,} steps are done. The same command resumes it.",
        )
    rate, similarity = (_mean_of_end(run.metrics[name]) for name in ("coding_rate_fraction", "similarity"))
    if rate < COLLAPSED_RATE and similarity > COLLAPSED_SIMILARITY:
        yield Remark(
            True,
            f"Collapse: at the end all projections are nearly equal (coding rate {percent(rate)}, similarity "
            f"{similarity:.3f}) and no longer distinguish images. Lower --learning-rate or "
            "--invariance-coefficient.",
        )
    elif still_falling(run.metrics["loss"]):
        yield Remark(
            False, "The loss was still falling at the end: more epochs (--max-epochs) would probably lower it further."
        )
    if done < FEW_STEPS and done == run.last_step:
        yield Remark(False, f"Training takes only {counted(done, 'step')}: treat the figures as those of a trial run.")


def _about_spectrum(spectrum: Spectrum | None) -> Iterator[Remark]:
    if spectrum is None:
        yield Remark(
            False, "There are no embeddings yet, so nothing below shows how good they are: run empssl eval on this run."
        )
        return
    rank, highest = spectrum.effective_rank, len(spectrum.values)
    if highest < MANY_DIRECTIONS:
        return
    if rank < 2:
        yield Remark(True, "Collapse: the embeddings of all test images are nearly the same.")
    elif rank < 0.02 * highest:
        yield Remark(
            True,
            f"The embeddings fill only about {rank:.1f} of {highest:,} dimensions, which suggests partial collapse.",
        )


def _about_predictions(run: Run, findings: Findings | None) -> Iterator[Remark]:
    if findings is None:
        if run.all_embeddings is not None:
            yield Remark(False, "Training or test images have no labels, so no accuracy is measured.")
        return
    classes, accuracy = len(run.class_sizes), findings.accuracy
    tested = int(findings.confusion.sum())
    if accuracy < 1 / classes + margin(max(accuracy, 1 / classes), tested):
        verb = "may be" if accuracy > 1 / classes else "is"
        yield Remark(True, f"kNN {verb} no better than guessing ({percent(accuracy)} with {classes} classes).")
    if run.has_other_images:
        yield Remark(
            False,
            "The images are not those that were embedded, so this page has no pictures. Run empssl eval, which embeds "
            "them again.",
        )
    elif run.datasets is None:
        yield Remark(False, "The images were not available when this page was written, so it has no pictures.")


def _about_measures(run: Run, findings: Findings | None) -> Iterator[Remark]:
    if findings is None:
        return
    knn, before = run.results.get("kNN"), run.results.get("kNN before training")
    if knn and not math.isclose(knn["top1"], findings.accuracy, abs_tol=1e-3):
        yield Remark(
            True,
            f"results.json says {percent(knn['top1'])} for kNN, but the embeddings give {percent(findings.accuracy)}: "
            "they come from different checkpoints or settings. Run empssl eval again.",
        )
    tested = int(findings.confusion.sum())
    comparable = knn and before and knn.get("embeddings") == before.get("embeddings")
    if knn and before and comparable and knn["top1"] <= before["top1"] + margin(knn["top1"], tested):
        yield Remark(True, "After training, kNN is not measurably better than with the untrained network.")
    smallest, voters = int(run.class_sizes.min()), run.config.evaluation.num_neighbours
    if smallest < voters:
        yield Remark(
            False,
            f"Small classes are outvoted: {voters} neighbours vote, and the smallest class has "
            f"{counted(smallest, 'training image')}. Lower --num-neighbours.",
        )
    if (half := margin(findings.accuracy, tested)) > WIDE_MARGIN:
        yield Remark(
            False,
            f"With {tested:,} test images, accuracies are uncertain by about ±{100 * half:.1f} points; compare runs "
            "over several seeds.",
        )


def still_falling(loss: np.ndarray) -> bool:
    """Whether the mean loss of the last quarter is clearly lower than that of the quarter before.

    The difference must exceed a tenth of the total fall and, to exclude noise, twice its standard error.
    """
    if len(loss) < 20:
        return False
    first, _, third, last = np.array_split(loss, 4)
    fall, error = third.mean() - last.mean(), math.hypot(third.std(), last.std()) / math.sqrt(len(last))
    return bool(fall > 2 * error and fall > 0.1 * (first.max() - last.mean()))


def _mean_of_end(values: np.ndarray) -> float:
    """The mean of the last tenth of the values."""
    return float(values[-max(1, len(values) // 10) :].mean())
