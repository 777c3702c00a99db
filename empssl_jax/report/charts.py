"""Geometry of the report's figures, for the templates to draw as SVG."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

WIDTH, HEIGHT = 360, 200  # of a curve, in SVG's units
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 26  # margins of the plot in it
MAP_SIDE = 400
MAX_POINTS = 600  # drawn of a curve; more cannot be told apart

Format = Callable[[float], str]


class Tick(NamedTuple):
    """A mark on an axis."""

    place: float
    text: str


class Curve(NamedTuple):
    """A line over an axis of whole numbers."""

    title: str
    path: str  # SVG's, of the curve
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    end: tuple[float, float]  # place of the last point
    first: str  # numbers in words
    last: str
    last_x: str
    x_name: str
    note: str  # what a newcomer should know
    mark: Tick | None = None  # a vertical line


class Dot(NamedTuple):
    """A point of a map."""

    x: float
    y: float
    colour: int
    hollow: bool


class Map(NamedTuple):
    """Points in the plane, and names where most of a class lies."""

    title: str
    dots: list[Dot]
    labels: list[tuple[float, float, str, int]]


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
    """A curve of the finite points, from its first to its last; None if there are fewer than two.

    Args:
        title: what is drawn.
        x: where, rising.
        y: how much; positive if logarithmic.
        show: writes a value of y.
        note: what a newcomer should know.
        x_name: what x counts.
        logarithmic: draw powers of ten equally far apart.
        mark: draw a vertical line at an x, with a text.
    """
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    finite = np.isfinite(xs) & np.isfinite(ys) & ((ys > 0) | (not logarithmic))
    xs, ys = xs[finite], ys[finite]
    if len(xs) < 2:
        return None
    drawn = spread(len(xs), MAX_POINTS)
    heights = np.log10(ys) if logarithmic else ys
    y_values = _powers_of_ten(heights.min(), heights.max()) if logarithmic else ticks(ys.min(), ys.max())
    low, high = min(heights.min(), y_values[0]), max(heights.max(), y_values[-1])
    x_place = _scale(xs[0], xs[-1], LEFT, WIDTH - RIGHT)
    y_place = _scale(low, high, HEIGHT - BOTTOM, TOP)
    points = [f"{x_place(xs[i]):.1f} {y_place(heights[i]):.1f}" for i in drawn]
    return Curve(
        title,
        "M" + "L".join(points),
        [Tick(x_place(value), _whole(value)) for value in _whole_ticks(xs[0], xs[-1])],
        [Tick(y_place(value), show(10**value if logarithmic else value)) for value in y_values],
        (x_place(xs[-1]), y_place(heights[-1])),
        show(ys[0]),
        show(ys[-1]),
        _whole(xs[-1]),
        x_name,
        note,
        Tick(x_place(min(max(mark[0], xs[0]), xs[-1])), mark[1]) if mark else None,
    )


def map_of(
    title: str,
    places: Float[np.ndarray, "M 2"],
    labels: Int[np.ndarray, " M"],
    hollow: Bool[np.ndarray, " M"],
    classes: Int[np.ndarray, " K"],
    names: Sequence[str],
) -> Map:
    """A map whose longer side fills the figure; each class is named at the median of its points.

    Args:
        title: how the places were found.
        places: of the points.
        labels: class of each point.
        hollow: which points are drawn as rings.
        classes: those on the map, in the order of their colours.
        names: of all classes.
    """
    low, high = places.min(axis=0), places.max(axis=0)
    scale = (MAP_SIDE - 20) / max(float((high - low).max()), 1e-12)
    placed = (places - (low + high) / 2) * scale * np.array([1, -1]) + MAP_SIDE / 2
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
    """About `count` round numbers that enclose an interval; of an empty interval the number and its neighbours."""
    if not high > low:
        low, high = low - max(abs(low), 1.0) / 2, high + max(abs(high), 1.0) / 2
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(number * step) for number in range(first, last + 1)]


def spread(size: int, count: int) -> list[int]:
    """At most `count` whole numbers below `size`, evenly spread, the first and the last among them."""
    return list(range(size)) if size <= count else np.linspace(0, size - 1, count).round().astype(int).tolist()


def _scale(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    length = high - low if high > low else 1.0
    return lambda value: round(float(first + (value - low) / length * (last - first)), 1)


def _whole_ticks(low: float, high: float) -> list[float]:
    """Round whole numbers inside an interval; its ends if there are too few."""
    inside = [value for value in ticks(low, high) if low <= value <= high and float(value).is_integer()]
    return inside if len(inside) > 1 else [low, high]


def _powers_of_ten(low: float, high: float) -> list[float]:
    first, last = math.floor(low + 1e-9), math.ceil(high - 1e-9)
    step = max(1, math.ceil((last - first) / 5))
    return [float(power) for power in range(first, max(last, first + 1) + step, step)]


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _apart(heights: list[float], gap: float = 13.0) -> list[float]:
    """Moves heights down until they lie apart, so that names do not hide each other."""
    moved = list(heights)
    for earlier, later in zip(*(np.argsort(heights)[cut] for cut in (slice(None, -1), slice(1, None))), strict=True):
        moved[later] = max(moved[later], moved[earlier] + gap)
    return moved
