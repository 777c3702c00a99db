"""Where the time of a train step goes on a GPU, read from a profile, as a Markdown table.

    empssl train --profile --workdir RUN
    python -m benchmarks.profile_table RUN/profile

Sums the durations of all kernels in the newest *.xplane.pb file (or *.xplane.pb.gz) by kind, which their names show.
"""

import gzip
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro
from jax.profiler import ProfileData

from empssl_jax.config.errors import UserError
from empssl_jax.runtime.profiling import FIRST_STEP, LAST_STEP
from empssl_jax.runtime.user_errors import user_errors_exit

# The first pattern that a kernel's name contains decides its kind.
KINDS = {
    "convolutions": r"fprop|dgrad|wgrad|conv\d*kernel|cudnn|nhwc",
    "reductions": r"reduce",
    "matrix products, Cholesky, solves": r"gemm|nvjet|cublas|trsm|potrf|gemv",
    "copies": r"mem(cpy|set)",
    "elementwise": r"",
}


@dataclass(frozen=True)
class Options:
    """The profile to read."""

    # Folder that contains a profile, or a profile.
    profile: tyro.conf.Positional[str]
    # Number of steps in the profile.
    steps: int = LAST_STEP - FIRST_STEP + 1


class Kind(NamedTuple):
    """The kernels of one kind."""

    milliseconds: float  # per step
    kernels: float  # per step


def read_profile(path: Path) -> ProfileData:
    """The profile in a file, or the newest below a folder; raises UserError if there is none."""
    files = [path] if path.is_file() else sorted(path.rglob("*.xplane.pb*"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise UserError(f"{path} contains no *.xplane.pb: give the profile/ folder of a run with --profile.")
    content = files[-1].read_bytes()
    return ProfileData.from_serialized_xspace(gzip.decompress(content) if files[-1].suffix == ".gz" else content)


def kinds(profile: ProfileData, steps: int) -> dict[str, Kind]:
    """Time and number of the kernels of each kind on the first device, per step, the longest first."""
    times, counts = defaultdict[str, float](float), defaultdict[str, int](int)
    for name, nanoseconds in _kernels(profile):
        kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
        times[kind] += nanoseconds / 1e6
        counts[kind] += 1
    ordered = sorted(times, key=lambda kind: -times[kind])
    return {kind: Kind(times[kind] / steps, counts[kind] / steps) for kind in ordered}


def _kernels(profile: ProfileData) -> Iterable[tuple[str, float]]:
    """Name and nanoseconds of each event on the streams of the first device."""
    for plane in profile.planes:
        if re.fullmatch(r"/device:GPU:0", plane.name):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    yield from ((event.name, event.duration_ns) for event in line.events)


def table(found: dict[str, Kind]) -> str:
    """The kinds as Markdown, with their sum."""
    total = Kind(*(sum(column) for column in zip(*found.values(), strict=True)))
    lines = ["| kernels | ms per step | share | kernels per step |", "| --- | --- | --- | --- |"]
    for name, kind in (*found.items(), ("all", total)):
        share = kind.milliseconds / total.milliseconds
        lines.append(f"| {name} | {kind.milliseconds:.2f} | {share:.0%} | {kind.kernels:.0f} |")
    return "\n".join(lines)


def main(options: Options) -> None:
    """Prints the table."""
    found = kinds(read_profile(Path(options.profile)), options.steps)
    if not found:
        raise UserError(f"{options.profile} has no kernels of a GPU: profile a run on one.")
    print(table(found))


if __name__ == "__main__":
    with user_errors_exit():
        main(tyro.cli(Options, description=__doc__))
