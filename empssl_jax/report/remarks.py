"""What is unusual about a run, in words, each remark with what to do about it."""

import math
from typing import NamedTuple

import numpy as np

from empssl_jax.report.findings import Findings, margin
from empssl_jax.report.run import Run
from empssl_jax.report.tables import percent

COLLAPSED_RATE = 0.05  # of the coding rate's span
COLLAPSED_SIMILARITY = 0.99
FEW_STEPS = 100
WIDE_MARGIN = 0.02


class Remark(NamedTuple):
    """One observation; a warning says that something went wrong, a note how far to trust a number."""

    warns: bool
    text: str


def remarks(run: Run, findings: Findings | None) -> list[Remark]:
    """All remarks about a run, warnings first."""
    found = [*_about_training(run), *_about_embeddings(run, findings), *_about_measures(run, findings)]
    return sorted(found, key=lambda remark: not remark.warns)


def _about_training(run: Run):
    steps = len(run.steps)
    if steps == 0:
        yield Remark(True, "There are no metrics of any step: training has not begun.")
        return
    done = int(run.steps[-1]) + 1
    if run.last_step is not None and done < run.last_step:
        yield Remark(
            True, f"Training has not ended: {done:,} of {run.last_step:,} steps are done. The same command goes on."
        )
    rate, similarity = (_mean_of_end(run.metrics[name]) for name in ("coding_rate_fraction", "similarity"))
    if rate < COLLAPSED_RATE and similarity > COLLAPSED_SIMILARITY:
        yield Remark(
            True,
            f"Collapse: at the end all projections are nearly equal (coding rate {percent(rate)}, similarity "
            f"{similarity:.3f}), so that they no longer tell images apart. Lower --learning-rate or "
            "--invariance-coefficient.",
        )
    elif still_falling(run.metrics["loss"]):
        yield Remark(
            False, "The loss was still falling at the end: more epochs (--max-epochs) would probably lower it further."
        )
    if done < FEW_STEPS and done == run.last_step:
        yield Remark(False, f"The whole training is {done} steps, which is short: take the figures as a try-out.")


def _about_embeddings(run: Run, findings: Findings | None):
    if findings is None:
        yield Remark(
            False, "There are no embeddings yet, so that nothing below says how good they are: run eval.py on the run."
        )
        return
    highest = len(findings.singular_values)
    if not findings.maps or findings.effective_rank < 2:
        yield Remark(True, "Collapse: the embeddings of all test images are nearly the same.")
    elif findings.effective_rank < 0.02 * highest:
        yield Remark(
            True,
            f"The embeddings fill only about {findings.effective_rank:.1f} of {highest:,} dimensions, which is a "
            "sign of partial collapse.",
        )
    classes, accuracy = len(findings.confusion), findings.accuracy
    tested = int(findings.confusion.sum())
    if accuracy < 1 / classes + margin(max(accuracy, 1 / classes), tested):
        yield Remark(True, f"kNN finds the class no better than guessing ({percent(accuracy)} with {classes} classes).")
    if run.datasets is None:
        yield Remark(False, "The images were not at hand when this page was written, so that it has no pictures.")


def _about_measures(run: Run, findings: Findings | None):
    if findings is None:
        return
    assert run.embeddings is not None
    knn, before = run.results.get("kNN"), run.results.get("kNN before training")
    if knn and not math.isclose(knn["top1"], findings.accuracy, abs_tol=1e-3):
        yield Remark(
            True,
            f"results.json says {percent(knn['top1'])} for kNN and the embeddings give {percent(findings.accuracy)}: "
            "they are of different checkpoints or settings. Run eval.py again.",
        )
    tested = int(findings.confusion.sum())
    alike = knn and before and knn.get("embeddings") == before.get("embeddings")
    if knn and before and alike and knn["top1"] <= before["top1"] + margin(knn["top1"], tested):
        yield Remark(True, "Training has not made kNN measurably better than the untrained network.")
    smallest = int(np.bincount(run.embeddings.bank.labels, minlength=len(findings.confusion)).min())
    voters = run.config.evaluation.num_neighbours
    if smallest < voters:
        yield Remark(
            False,
            f"Too few neighbours of a kind: {voters} neighbours vote, and the smallest class has {smallest} training "
            "images, so that it is outvoted. Lower --num-neighbours.",
        )
    if (half := margin(findings.accuracy, tested)) > WIDE_MARGIN:
        yield Remark(
            False,
            f"Measured on {tested:,} test images, accuracies are certain to about ±{100 * half:.1f} points only; "
            "compare runs over several seeds.",
        )


def still_falling(loss: np.ndarray) -> bool:
    """Whether the last quarter's mean is lower than that of the quarter before by more than a tenth of the whole fall.

    It also has to be lower by twice its standard error, so that noise does not count.
    """
    if len(loss) < 20:
        return False
    first, _, third, last = np.array_split(loss, 4)
    fall, error = third.mean() - last.mean(), math.hypot(third.std(), last.std()) / math.sqrt(len(last))
    return bool(fall > 2 * error and fall > 0.1 * (first.max() - last.mean()))


def _mean_of_end(values: np.ndarray) -> float:
    """Mean of the last tenth."""
    return float(values[-max(1, len(values) // 10) :].mean())
