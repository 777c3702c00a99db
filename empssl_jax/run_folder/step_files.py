"""Files of one JSON object a step, in order, each step once, also across interruptions."""

import json
import math
from pathlib import Path
from typing import Any

from empssl_jax.run_folder.workdir import replacing


def drop_steps_from(path: Path, first_step: int) -> None:
    """Keeps the lines of the steps before `first_step`; what is no line of a step, as one cut by a crash, goes too."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(errors="replace").split("\n") if _step_of(line) < first_step]
    with replacing(path) as file:
        file.write("".join(line + "\n" for line in kept).encode())


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, in order, without what is no line of a step; none if there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(errors="replace").split("\n")
    return [json.loads(line) for line in lines if _step_of(line) < math.inf]


def _step_of(line: str) -> int | float:
    """The step of a line, infinite if it is none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if type(step) is int and step >= 0 else math.inf
