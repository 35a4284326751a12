"""The geometry of the report's pictures, as plain numbers; templates/figures.html.j2 makes SVG of them.

tasks and what they need ─► layered() ─► boxes in columns, one lane for each artifact, and lines between them
errors of samples        ─► histogram() ─► bars over decades
errors after nodes       ─► curve() ─► a line over the places of a graph
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

FLOOR = 1e-9  # errors below it are drawn there: a logarithm has no zero

BOX = (120, 36)
GAP = (24, 8)  # between columns, between rows
MARGIN = 8
LANE = 10  # between lanes


class Box(NamedTuple):
    name: str
    x: int
    y: int


class Lane(NamedTuple):
    name: str
    y: int
    height: int


class Layout(NamedTuple):
    width: int
    height: int
    lanes: list[Lane]
    boxes: list[Box]
    lines: list[str]  # paths


def layered(needs: dict[str, set[str]], lanes: dict[str, str]) -> Layout:
    """Where each task of a graph is drawn: behind all that it needs, in its lane.

    needs: what each task needs, itself among the keys, in the order of the build. lanes: the lane of each task. What a
    task needs by way of another is not drawn.
    """
    columns: dict[str, int] = {}
    for name in needs:  # a longest path; the tasks stand in any order
        _column(name, needs, columns)
    rows = _rows(_reduced(needs), lanes, columns)
    tops: dict[int, int] = {}
    bands, y = [], MARGIN
    for lane in dict.fromkeys(lanes.values()):
        mine = sorted({rows[name] for name in needs if lanes[name] == lane})
        top = y
        for row in mine:
            tops[row] = y
            y += BOX[1] + GAP[1]
        bands.append(Lane(lane, top - GAP[1] // 2, y - top))
        y += LANE
    across = [MARGIN + column * (BOX[0] + GAP[0]) for column in range(max(columns.values(), default=0) + 1)]
    boxes = [Box(name, across[columns[name]], tops[rows[name]]) for name in needs]
    taken = {(rows[name], columns[name]) for name in needs}
    lines = [
        _line(across, tops, taken, (rows[source], columns[source]), (rows[name], columns[name]))
        for name, sources in _reduced(needs).items()
        for source in sorted(sources)
    ]
    return Layout(across[-1] + BOX[0] + MARGIN, y - LANE + MARGIN, bands, boxes, lines)


def _column(name: str, needs: dict[str, set[str]], known: dict[str, int]) -> int:
    if name not in known:
        known[name] = max((_column(source, needs, known) + 1 for source in needs[name]), default=0)
    return known[name]


def _reduced(needs: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without what is needed by way of something else that is needed."""
    further: dict[str, set[str]] = {}

    def behind(name: str) -> set[str]:
        if name not in further:
            further[name] = set().union(*({source} | behind(source) for source in needs[name]))
        return further[name]

    return {name: {s for s in mine if not any(s in behind(other) for other in mine)} for name, mine in needs.items()}


def _rows(needs: dict[str, set[str]], lanes: dict[str, str], columns: dict[str, int]) -> dict[str, int]:
    """The row of each task: that of what it needs in its lane, or the next one of the lane with room in its column."""
    order = list(dict.fromkeys(lanes.values()))
    inside: dict[str, int] = {}
    taken: set[tuple[str, int, int]] = set()
    for name in sorted(needs, key=lambda name: columns[name]):  # stable: of equals, in the order of the build
        lane = lanes[name]
        row = min((inside[source] for source in needs[name] if lanes[source] == lane), default=0)
        while (lane, row, columns[name]) in taken:
            row += 1
        inside[name] = row
        taken.add((lane, row, columns[name]))
    heights = [max(inside[name] for name in needs if lanes[name] == lane) + 1 for lane in order]
    first = {lane: sum(heights[:place]) for place, lane in enumerate(order)}
    return {name: first[lanes[name]] + inside[name] for name in needs}


Place = tuple[int, int]  # row, column


def _line(across: list[int], tops: dict[int, int], taken: set[Place], source: Place, target: Place) -> str:
    """From the right of one box to the left of another, which stands in a column behind it.

    It changes rows in the gap behind the source and goes along the target's row; where a box stands there, along the
    source's, and changes in the gap before the target: a line behind a box would seem to lead through it.
    """
    (from_row, from_column), (to_row, to_column) = source, target
    between = range(from_column + 1, to_column)
    early = not any((to_row, column) in taken for column in between)
    turn = from_column if early else to_column - 1
    x1, y1 = across[from_column] + BOX[0], tops[from_row] + BOX[1] // 2
    x2, y2 = across[to_column], tops[to_row] + BOX[1] // 2
    left, right = across[turn] + BOX[0], across[turn + 1]
    middle = (left + right) // 2
    return f"M{x1} {y1}H{left}C{middle} {y1} {middle} {y2} {right} {y2}H{x2}"


class Tick(NamedTuple):
    at: float
    label: str


class Scale(NamedTuple):
    """Decades on a length."""

    low: int
    high: int
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (math.log10(max(value, FLOOR)) - self.low) / (self.high - self.low)
        return round(self.start + min(max(share, 0), 1) * (self.end - self.start), 1)

    def ticks(self) -> list[Tick]:
        step = 1 if self.high - self.low <= 6 else 2
        return [Tick(self(10.0**power), f"1e{power:d}") for power in range(self.low, self.high + 1, step)]


def decades(values: Iterable[float], start: float, end: float) -> Scale:
    """A scale on which all these values have a place."""
    logarithms = [math.log10(max(value, FLOOR)) for value in values] or [0.0]
    low = math.floor(min(logarithms))
    return Scale(low, max(math.ceil(max(logarithms)), low + 1), start, end)


class Bar(NamedTuple):
    x: float
    y: float
    width: float
    height: float
    told: str


class Histogram(NamedTuple):
    width: int
    height: int
    bars: list[Bar]
    ticks: list[Tick]
    limit: float
    base: float


def histogram(errors: Sequence[float], limit: float, every: Iterable[float]) -> Histogram:
    """How many samples have which error, four bars to a decade. every: the values that the axis has room for."""
    width, height, base, top = 300, 116, 92, 14
    scale = decades(every, 18, width - 18)
    bins: dict[int, int] = {}
    for error in errors:
        bins.setdefault(place := math.floor(math.log10(max(error, FLOOR)) * 4), 0)
        bins[place] += 1
    most = max(bins.values(), default=1)
    bars = []
    for place, count in sorted(bins.items()):
        left, right = scale(10 ** (place / 4)), scale(10 ** ((place + 1) / 4))
        tall = round(count / most * (base - top), 1)
        told = f"{count} of {len(errors)} samples, {10 ** (place / 4):.1e} to {10 ** ((place + 1) / 4):.1e}"
        bars.append(Bar(left, base - tall, max(right - left - 1, 1), tall, told))
    return Histogram(width, height, bars, scale.ticks(), scale(limit), base)


class Point(NamedTuple):
    x: float
    y: float
    told: str
    kind: str  # "", "jump", "lost"


class Curve(NamedTuple):
    width: int
    height: int
    path: str
    points: list[Point]
    ticks: list[Tick]
    left: float
    base: float
    last: int


def curve(layers: Sequence[dict[str, Any]], jump: str | None) -> Curve:
    """The error after each node by its place in the graph; one that is no number (None) stands at the top."""
    width, height, left, top, base = 900, 220, 52, 18, 190
    ordered = sorted(layers, key=lambda layer: layer["place"])
    scale = decades((layer["error"] for layer in ordered if layer["error"] is not None), base, top)
    last = max((layer["place"] for layer in ordered), default=0)
    points = []
    for layer in ordered:
        lost = layer["error"] is None
        found = "NaN or infinity" if lost else f"{layer['error']:.1e}"
        told = f"{layer['node']} ({layer['operator']}): {found}"
        x = round(left + layer["place"] / max(last, 1) * (width - left - 14), 1)
        kind = "lost" if lost else "jump" if layer["node"] == jump else ""
        points.append(Point(x, top / 2 if lost else scale(layer["error"]), told, kind))
    path = "M" + "L".join(f"{point.x} {point.y}" for point in points) if points else ""
    return Curve(width, height, path, points, scale.ticks(), left, base, last)
