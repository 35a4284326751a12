"""The geometry of the report's pictures, as plain numbers; templates/figures.html.j2 makes SVG of them.

tasks, dependencies         ─► task_graph() ─► boxes in columns, one band for each artifact, and edges between them
errors of samples           ─► histogram()  ─► bars over decades
errors after nodes          ─► curve()      ─► a line over the positions of the nodes in a graph
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

MIN_ERROR = 1e-9  # smaller errors are plotted at this value: a logarithm has no zero

BOX_WIDTH, BOX_HEIGHT = 136, 36  # all lengths are in pixels
COLUMN_GAP, ROW_GAP = 20, 8
MARGIN = 8
BAND_GAP = 10
BAND_TITLE = 18  # above the boxes of a band with a name

BINS_PER_DECADE = 4  # bars of a histogram


class Box(NamedTuple):
    """The upper left corner of a task's box."""

    name: str
    x: int
    y: int


class Band(NamedTuple):
    """A horizontal band behind the boxes of one artifact."""

    name: str
    y: int
    height: int


class Graph(NamedTuple):
    width: int
    height: int
    bands: list[Band]
    boxes: list[Box]
    edges: list[str]  # SVG path data


def task_graph(dependencies: dict[str, set[str]], bands: dict[str, str]) -> Graph:
    """Place the tasks of a model: each task to the right of the tasks that it requires, in the band of its artifact.

    A dependency that follows from others gets no edge.

    Args:
        dependencies: What each task requires. The requirements are keys themselves, in the order of the build.
        bands: The name of each task's band.
    """
    columns: dict[str, int] = {}
    for name in dependencies:  # the tasks may have any order
        _set_column(name, dependencies, columns)
    direct = _direct_dependencies(dependencies)
    rows = _rows(direct, bands, columns)
    tops: dict[int, int] = {}  # y of each row
    placed_bands, y = [], MARGIN
    for band in dict.fromkeys(bands.values()):
        top = y
        y += BAND_TITLE if band else 0
        for row in sorted({rows[name] for name in dependencies if bands[name] == band}):
            tops[row] = y
            y += BOX_HEIGHT + ROW_GAP
        placed_bands.append(Band(band, top - ROW_GAP // 2, y - top))
        y += BAND_GAP
    lefts = [MARGIN + column * (BOX_WIDTH + COLUMN_GAP) for column in range(max(columns.values(), default=0) + 1)]
    boxes = [Box(name, lefts[columns[name]], tops[rows[name]]) for name in dependencies]
    occupied = {(rows[name], columns[name]) for name in dependencies}
    edges = [
        _edge(lefts, tops, occupied, (rows[source], columns[source]), (rows[name], columns[name]))
        for name, sources in direct.items()
        for source in sorted(sources)
    ]
    return Graph(lefts[-1] + BOX_WIDTH + MARGIN, y - BAND_GAP + MARGIN, placed_bands, boxes, edges)


def _set_column(name: str, dependencies: dict[str, set[str]], columns: dict[str, int]) -> int:
    """Set and return the column of a task: the length of the longest path that leads to it."""
    if name not in columns:
        sources = dependencies[name]
        columns[name] = max((_set_column(source, dependencies, columns) + 1 for source in sources), default=0)
    return columns[name]


def _direct_dependencies(dependencies: dict[str, set[str]]) -> dict[str, set[str]]:
    """The dependencies of each task, without dependencies that another one of them requires already."""
    ancestors: dict[str, set[str]] = {}

    def ancestors_of(name: str) -> set[str]:
        if name not in ancestors:
            ancestors[name] = set().union(*({source} | ancestors_of(source) for source in dependencies[name]))
        return ancestors[name]

    return {
        name: {source for source in sources if not any(source in ancestors_of(other) for other in sources)}
        for name, sources in dependencies.items()
    }


def _rows(dependencies: dict[str, set[str]], bands: dict[str, str], columns: dict[str, int]) -> dict[str, int]:
    """The row of each task: the row of its dependency in the same band, or the next free row of the band."""
    order = list(dict.fromkeys(bands.values()))
    row_in_band: dict[str, int] = {}
    occupied: set[tuple[str, int, int]] = set()
    for name in sorted(dependencies, key=lambda name: columns[name]):  # stable: within a column, the order of the build
        band = bands[name]
        row = min((row_in_band[source] for source in dependencies[name] if bands[source] == band), default=0)
        while (band, row, columns[name]) in occupied:
            row += 1
        row_in_band[name] = row
        occupied.add((band, row, columns[name]))
    heights = [max(row_in_band[name] for name in dependencies if bands[name] == band) + 1 for band in order]
    first_rows = {band: sum(heights[:index]) for index, band in enumerate(order)}
    return {name: first_rows[bands[name]] + row_in_band[name] for name in dependencies}


Cell = tuple[int, int]  # row, column


def _edge(lefts: list[int], tops: dict[int, int], occupied: set[Cell], source: Cell, target: Cell) -> str:
    """The path from the right of one box to the left of another, which stands in a later column.

    The edge changes rows in the gap after the source and follows the target's row. Where a box stands in that row, it
    follows the source's row and changes in the gap before the target: an edge behind a box would seem to lead through
    it.
    """
    (from_row, from_column), (to_row, to_column) = source, target
    between = range(from_column + 1, to_column)
    turns_early = not any((to_row, column) in occupied for column in between)
    turn = from_column if turns_early else to_column - 1
    x1, y1 = lefts[from_column] + BOX_WIDTH, tops[from_row] + BOX_HEIGHT // 2
    x2, y2 = lefts[to_column], tops[to_row] + BOX_HEIGHT // 2
    left, right = lefts[turn] + BOX_WIDTH, lefts[turn + 1]
    middle = (left + right) // 2
    return f"M{x1} {y1}H{left}C{middle} {y1} {middle} {y2} {right} {y2}H{x2}"


class Tick(NamedTuple):
    position: float
    label: str


class LogScale(NamedTuple):
    """Decades on a length: from 10 ** low at `start` to 10 ** high at `end`."""

    low: int
    high: int
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The position of a value. Values beyond the scale are placed at its ends."""
        share = (math.log10(max(value, MIN_ERROR)) - self.low) / (self.high - self.low)
        return round(self.start + min(max(share, 0), 1) * (self.end - self.start), 1)

    def ticks(self) -> list[Tick]:
        step = 1 if self.high - self.low <= 6 else 2
        return [Tick(self(10.0**power), f"1e{power:d}") for power in range(self.low, self.high + 1, step)]


def log_scale(values: Iterable[float], start: float, end: float) -> LogScale:
    """A scale of whole decades that contains all these values."""
    logarithms = [math.log10(max(value, MIN_ERROR)) for value in values] or [0.0]
    low = math.floor(min(logarithms))
    return LogScale(low, max(math.ceil(max(logarithms)), low + 1), start, end)


class Bar(NamedTuple):
    x: float
    y: float
    width: float
    height: float
    label: str


class Histogram(NamedTuple):
    width: int
    height: int
    bars: list[Bar]
    ticks: list[Tick]
    limit: float  # x
    base: float  # y of the axis


def histogram(errors: Sequence[float], limit: float, scale_values: Iterable[float]) -> Histogram:
    """The numbers of samples by error, with BINS_PER_DECADE bars in each decade.

    Args:
        errors: One for each sample.
        limit: Marked by a line.
        scale_values: The values that the axis has to contain. Several histograms with the same ones are comparable.
    """
    width, height, base, top = 300, 116, 92, 14
    scale = log_scale(scale_values, 18, width - 18)
    counts: dict[int, int] = {}
    for error in errors:
        index = math.floor(math.log10(max(error, MIN_ERROR)) * BINS_PER_DECADE)
        counts[index] = counts.get(index, 0) + 1
    largest = max(counts.values(), default=1)
    bars = []
    for index, count in sorted(counts.items()):
        low, high = (10 ** (edge / BINS_PER_DECADE) for edge in (index, index + 1))
        left, right = scale(low), scale(high)
        bar_height = round(count / largest * (base - top), 1)
        label = f"{count} of {len(errors)} samples, {low:.1e} to {high:.1e}"
        bars.append(Bar(left, base - bar_height, max(right - left - 1, 1), bar_height, label))
    return Histogram(width, height, bars, scale.ticks(), scale(limit), base)


class Point(NamedTuple):
    x: float
    y: float
    label: str
    kind: str  # "", "jump", "not-finite"; a class of report.css


class Curve(NamedTuple):
    width: int
    height: int
    path: str  # SVG path data
    points: list[Point]
    ticks: list[Tick]
    left: float  # x of the axis
    base: float  # y of the axis
    last: int  # position of the last node


def curve(layers: Sequence[dict[str, Any]], jump: str | None) -> Curve:
    """The error after each node, by the position of the node in the graph.

    Args:
        layers: What `doit layers` has measured. An error of None is NaN or infinity; its point stands at the top.
        jump: Name of the node at which the error jumps.
    """
    width, height, left, top, base = 900, 220, 52, 18, 190
    ordered = sorted(layers, key=lambda layer: layer["place"])
    scale = log_scale((layer["error"] for layer in ordered if layer["error"] is not None), base, top)
    last = max((layer["place"] for layer in ordered), default=0)
    points = []
    for layer in ordered:
        finite = layer["error"] is not None
        error = f"{layer['error']:.1e}" if finite else "NaN or infinity"
        label = f"{layer['node']} ({layer['operator']}): {error}"
        x = round(left + layer["place"] / max(last, 1) * (width - left - 14), 1)
        kind = "not-finite" if not finite else "jump" if layer["node"] == jump else ""
        points.append(Point(x, scale(layer["error"]) if finite else top / 2, label, kind))
    path = "M" + "L".join(f"{point.x} {point.y}" for point in points) if points else ""
    return Curve(width, height, path, points, scale.ticks(), left, base, last)
