"""What was measured of a run: results.json, accuracies by the name of the measure."""

import json
from pathlib import Path
from typing import Any

from empssl_jax.checks import UserError, one_line
from empssl_jax.distributed import is_first_process
from empssl_jax.workdir import replacing

RESULTS_FILE = "results.json"
Accuracy = dict[str, Any]  # "top1" and "top5", as fractions; in the file also "embeddings", how these were made


def format_table(results: dict[str, Accuracy]) -> str:
    """Accuracies in percent, a line each."""
    width = max(map(len, results))
    lines = [f"{'':{width}}   top-1   top-5"]
    lines += [
        f"{name:{width}}  {100 * value['top1']:5.2f}%  {100 * value['top5']:5.2f}%" for name, value in results.items()
    ]
    return "\n".join(lines)


def add_results(folder: Path, results: dict[str, Accuracy], embeddings: str | None = None) -> dict[str, Accuracy]:
    """Writes results into the folder's results.json, beside those of other names that are there; returns all.

    Args:
        folder: of the run, or of the embeddings.
        results: accuracies by the name of the measure.
        embeddings: in words, how those were made that the accuracies are of, if that is known.
    """
    made = {} if embeddings is None else {"embeddings": embeddings}
    together = load_results(folder) | {name: accuracy | made for name, accuracy in results.items()}
    if is_first_process():
        with replacing(folder / RESULTS_FILE) as file:
            file.write((json.dumps(together, indent=2) + "\n").encode())
    return together


def load_results(folder: Path) -> dict[str, Accuracy]:
    """What results.json holds, nothing if there is none; raises UserError if it is anything else."""
    path = folder / RESULTS_FILE
    try:
        results = dict(json.loads(path.read_bytes())) if path.exists() else {}
        if results:
            format_table(results)
        return results
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, OSError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{path} cannot be read ({reason}): delete it, or move it elsewhere to keep it.") from error
