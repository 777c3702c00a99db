"""Measures accuracy against minutes on two CPU cores, for encoders and trainings of several sizes.

    python -m experiments.frontier [--points NAME ...] [--draw]

Each point is configs/cifar10_cpu.py with other sizes. It trains on the first 45,000 training images of CIFAR-10 and
measures kNN on the last 5,000 *training* images, so the choice among the points uses no test images. Minutes are the
wall time of train.py, which trains, embeds and measures kNN, with nothing else running. Points that are already in
experiments/results/frontier.jsonl are not run again. --draw writes docs/images/frontier.svg and prints the table.
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.measure import environment
from empssl_jax.run_folder.results import load_results
from experiments.records import RESULTS, append_line, read_lines

ROOT = Path(__file__).parents[1]
SPLITS = ["--train-split", "train[:45000]", "--test-split", "train[45000:]"]
POINTS: dict[str, dict[str, int]] = {
    "width 16": {"width": 16, "max-epochs": 1},
    "width 32": {"width": 32, "max-epochs": 1},
    "width 32, 2 epochs": {"width": 32, "max-epochs": 2},
    "width 48": {"width": 48, "max-epochs": 1},
}


@dataclass(frozen=True)
class Options:
    """The points to run or to draw."""

    # Names of the points to run.
    points: tuple[str, ...] = tuple(POINTS)
    # Folder for the runs.
    folder: str = "runs/frontier"
    # File for the results, one line per point.
    output: str = str(RESULTS / "frontier.jsonl")
    # SVG file that --draw writes.
    picture: str = str(ROOT / "docs" / "images" / "frontier.svg")
    # Draw the points in the output file and print their table, without running any.
    draw: bool = False


def run(name: str, workdir: Path) -> dict[str, Any]:
    """Trains and measures a point; returns its line of the output file."""
    sizes = [f"--{option}={value}" for option, value in POINTS[name].items()]
    command = ["train.py", "--config", "configs/cifar10_cpu.py", *SPLITS, *sizes, "--workdir", str(workdir)]
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    minutes = (time.perf_counter() - start) / 60
    return {"point": name, "minutes": round(minutes, 2)} | load_results(workdir)["kNN"] | environment()


def table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table of the points, fastest first. Bold accuracies are above those of all faster points."""
    text = ["| encoder | minutes | kNN top-1 | kNN top-5 |", "| --- | --- | --- | --- |"]
    best = 0.0
    for line in sorted(lines, key=lambda line: line["minutes"]):
        accuracy = f"{100 * line['top1']:.1f} %"
        accuracy = f"**{accuracy}**" if line["top1"] > best else accuracy
        best = max(best, line["top1"])
        text.append(f"| {line['point']} | {line['minutes']:.1f} | {accuracy} | {100 * line['top5']:.1f} % |")
    return "\n".join(text) + "\n"


def picture(lines: list[dict[str, Any]]) -> str:
    """An SVG of the points, with minutes on the horizontal and accuracy on the vertical axis."""
    width, height, left, bottom = 640, 360, 50, 40
    right = 10 * (max(line["minutes"] for line in lines) // 10 + 1)
    low = 5 * (min(100 * line["top1"] for line in lines) // 5)
    high = 5 * (max(100 * line["top1"] for line in lines) // 5 + 1)

    def x(minutes: float) -> float:
        return left + (width - left - 130) * minutes / right

    def y(percent: float) -> float:
        return height - bottom - (height - bottom - 20) * (percent - low) / (high - low)

    parts = []
    for percent in range(int(low), int(high) + 1, 5):
        parts.append(f'<path d="M{left} {y(percent):.1f}H{x(right):.1f}" stroke="#8884"/>')
        parts.append(f'<text x="{left - 8}" y="{y(percent) + 4:.1f}" text-anchor="end">{percent} %</text>')
    for minutes in range(0, int(right) + 1, 10):
        parts.append(f'<text x="{x(minutes):.1f}" y="{height - bottom + 20}" text-anchor="middle">{minutes}</text>')
    parts.append(f'<text x="{x(right / 2):.1f}" y="{height - 4}" text-anchor="middle">minutes on two cores</text>')
    for line in lines:
        column, row = x(line["minutes"]), y(100 * line["top1"])
        parts.append(f'<circle cx="{column:.1f}" cy="{row:.1f}" r="4" fill="#2a6fbb"/>')
        parts.append(f'<text x="{column + 8:.1f}" y="{row - 4:.1f}">{line["point"]}</text>')
    style = "text{font:12px sans-serif;fill:#777}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"><style>{style}</style>'
    return head + "".join(parts) + "</svg>\n"


def main(options: Options) -> None:
    """Runs the points that the output file lacks, or draws those that it has."""
    output = Path(options.output)
    lines = read_lines(output)
    if options.draw:
        Path(options.picture).write_text(picture(lines))
        print(table(lines), end="")
        return
    for name in options.points:
        if name not in {line["point"] for line in lines}:
            append_line(output, run(name, Path(options.folder) / name.replace(" ", "_")))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
