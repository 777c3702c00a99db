"""Geometry of the report's figures, which the templates draw as SVG."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from empssl_jax.data.datasets import spread

WIDTH, HEIGHT = 360, 200  # of a curve's figure, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 26  # margins of the plot inside it
MAP_SIDE = 400  # of a map's figure, in SVG units
MAX_POINTS = 600  # drawn of a curve; more would not be visible

Format = Callable[[float], str]


class Tick(NamedTuple):
    """A mark on an axis."""

    position: float  # in SVG units
    text: str


class Curve(NamedTuple):
    """A line over an axis of integers. Positions are in SVG units."""

    title: str
    path: str  # `d` of the SVG path
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    end: tuple[float, float]  # position of the last point
    first: str  # the first value
    last: str  # the last value
    last_x: str
    x_name: str
    note: str  # explains the curve to a newcomer
    mark: Tick | None = None  # a vertical line


class Dot(NamedTuple):
    """A point on a map, in SVG units."""

    x: float
    y: float
    colour: int
    hollow: bool


class Map(NamedTuple):
    """Points in the plane, with the name of each class near its points."""

    title: str
    dots: list[Dot]
    labels: list[tuple[float, float, str, int]]  # x, y, name and colour


def curve(
    title: str,
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    show: Format,
    note: str,
    *,
    x_name: str = "step",
    logarithmic: bool = False,
    mark: tuple[float, str] | None = None,
) -> Curve | None:
    """A curve through the finite points; None if there are fewer than two.

    Args:
        title: name of the curve.
        x: ascending.
        y: one value for each x. On a logarithmic axis, values that are not positive are left out.
        show: formats a value of y.
        note: explains the curve to a newcomer.
        x_name: what x counts.
        logarithmic: whether the y axis is logarithmic.
        mark: x and text of a vertical line.
    """
    xs, ys = _drawable(x, y, logarithmic)
    if len(xs) < 2:
        return None
    heights = np.log10(ys) if logarithmic else ys
    y_values = _powers_of_ten(heights.min(), heights.max()) if logarithmic else ticks(ys.min(), ys.max())
    low, high = min(heights.min(), y_values[0]), max(heights.max(), y_values[-1])
    x_position = _scale(xs[0], xs[-1], LEFT, WIDTH - RIGHT)
    y_position = _scale(low, high, HEIGHT - BOTTOM, TOP)
    points = [f"{x_position(xs[i]):.1f} {y_position(heights[i]):.1f}" for i in spread(len(xs), MAX_POINTS)]
    return Curve(
        title,
        "M" + "L".join(points),
        [Tick(x_position(value), _integer(value)) for value in _integer_ticks(xs[0], xs[-1])],
        [Tick(y_position(value), show(10**value if logarithmic else value)) for value in y_values],
        (x_position(xs[-1]), y_position(heights[-1])),
        show(ys[0]),
        show(ys[-1]),
        _integer(xs[-1]),
        x_name,
        note,
        Tick(x_position(min(max(mark[0], xs[0]), xs[-1])), mark[1]) if mark else None,
    )


def _drawable(
    x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, logarithmic: bool
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The points that are finite and, for a logarithmic axis, positive."""
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    kept = np.isfinite(xs) & np.isfinite(ys) & ((ys > 0) | (not logarithmic))
    return xs[kept], ys[kept]


def map_of(
    title: str,
    points: Float[np.ndarray, "M 2"],
    labels: Int[np.ndarray, " M"],
    hollow: Bool[np.ndarray, " M"],
    classes: Int[np.ndarray, " K"],
    names: Sequence[str],
) -> Map:
    """A map whose longer side fills the figure; each class is named at the median of its points.

    Args:
        title: the method that computed the points.
        points: coordinates in the plane.
        labels: class of each point.
        hollow: which points are drawn as rings.
        classes: the classes on the map, in the order of their colours.
        names: names of all classes.
    """
    low, high = points.min(axis=0), points.max(axis=0)
    scale = (MAP_SIDE - 20) / max(float((high - low).max()), 1e-12)
    placed = (points - (low + high) / 2) * scale * np.array([1, -1]) + MAP_SIDE / 2
    colours = {int(label): number for number, label in enumerate(classes)}
    dots = [
        Dot(round(float(x), 1), round(float(y), 1), colours[int(label)], bool(ring))
        for (x, y), label, ring in zip(placed, labels, hollow, strict=True)
    ]
    middles = {c: np.median(placed[labels == c], axis=0) for c in colours if (labels == c).any()}
    heights = _apart([float(middle[1]) for middle in middles.values()])
    texts = [
        (round(float(middle[0]), 1), round(height, 1), names[c], colours[c])
        for (c, middle), height in zip(middles.items(), heights, strict=True)
    ]
    return Map(title, dots, texts)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers that enclose an interval. An empty interval is widened around its only number."""
    if not high > low:
        low, high = low - max(abs(low), 1.0) / 2, high + max(abs(high), 1.0) / 2
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(number * step) for number in range(first, last + 1)]


def _scale(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    """The linear map from [low, high] to [first, last], rounded to a tenth."""
    length = high - low if high > low else 1.0
    return lambda value: round(float(first + (value - low) / length * (last - first)), 1)


def _integer_ticks(low: float, high: float) -> list[float]:
    """Round integers inside an interval; its ends if there are fewer than two."""
    inside = [value for value in ticks(low, high) if low <= value <= high and float(value).is_integer()]
    return inside if len(inside) > 1 else [low, high]


def _powers_of_ten(low: float, high: float) -> list[float]:
    """Integer exponents that enclose an interval of exponents."""
    first, last = math.floor(low + 1e-9), math.ceil(high - 1e-9)
    step = max(1, math.ceil((last - first) / 5))
    return [float(power) for power in range(first, max(last, first + 1) + step, step)]


def _integer(value: float) -> str:
    return f"{value:,.0f}"


def _apart(heights: list[float], gap: float = 13.0) -> list[float]:
    """Moves heights down until they are at least `gap` apart, to keep names from overlapping."""
    moved = list(heights)
    for earlier, later in zip(*(np.argsort(heights)[cut] for cut in (slice(None, -1), slice(1, None))), strict=True):
        moved[later] = max(moved[later], moved[earlier] + gap)
    return moved
