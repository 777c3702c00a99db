"""Runs measurements in the order of their value within a time budget; each result becomes a line of a file at once."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measure import environment
from empssl_jax.config.errors import one_line
from experiments.records import append_line, read_lines

LIMIT = 3.0  # times its estimate, after which a row is stopped and counts as failed

Values = dict[str, Any]


class Row(NamedTuple):
    """A measurement. It returns its values, or None if it has more to do at the next visit."""

    measure: Callable[[], Values | None]
    estimate: float  # seconds; the row does not start with less left


class _TimeUpError(BaseException):
    """Not an Exception, so that nothing that the row calls takes it for an error of its own."""


def run(
    rows: Mapping[str, Row],
    path: Path,
    left: Callable[[], float],
    named: Sequence[str] = (),
    patience: float = 1.0,
) -> None:
    """Measures the rows that `path` lacks; appends a line for each: its values or error, seconds and environment.

    A row that the end of the budget stops gets no line, so that the next visit measures it.

    Args:
        rows: the measurements, in the order of their value.
        path: file of one JSON object per line.
        left: returns the seconds that are left.
        named: if not empty, the only rows to measure; those that failed before are measured again.
        patience: factor of the rows' limits.
    """
    for name, row in rows.items():
        if name not in missing(rows, path, named):
            continue
        start = left()
        if start < row.estimate:
            print(f"{name}: not started, {start:.0f} s are left and it takes about {row.estimate:.0f}", flush=True)
            continue
        print(f"{name}: {start:.0f} s left", flush=True)
        values = _measured(row, patience * LIMIT * row.estimate, start)
        if values is not None:
            line = {"row": name, "seconds": round(start - left(), 2)} | values
            print(line, flush=True)
            append_line(path, line | environment())


def missing(rows: Mapping[str, Row], path: Path, named: Sequence[str] = ()) -> list[str]:
    """The names of the rows without a line in `path`, and of those in `named` with no line but errors."""
    lines = read_lines(path)
    measured = {line["row"] for line in lines if "error" not in line}
    failed = {line["row"] for line in lines} - measured
    chosen = [name for name in rows if name in named or not named]
    return [name for name in chosen if name not in measured and (named or name not in failed)]


def _measured(row: Row, limit: float, left: float) -> Values | None:
    """The row's values, or its error; None if it is to be measured at the next visit."""
    try:
        with _alarm(min(limit, left)):
            return row.measure()
    except _TimeUpError:
        return {"error": f"stopped after {limit:.0f} s"} if limit < left else None
    except Exception as error:  # whatever fails, the other rows are measured
        return {"error": f"{type(error).__name__}: {one_line(error)}"}


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raises _TimeUpError inside the context after so many seconds, as soon as Python code runs."""

    def ring(number: int, frame: object) -> None:
        raise _TimeUpError

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
