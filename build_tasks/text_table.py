"""Tables for people, as text."""

from collections.abc import Sequence


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "", left: Sequence[str] = ()) -> str:
    """Rows under their columns; the first column and those in `left` to the left, the others to the right.

    As wide as it needs to be. Plain text, since it is also shown where rich is not installed.
    """
    lines = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lefts = [index == 0 or column in left for index, column in enumerate(columns)]
    told = [
        " "
        + "   ".join(
            f"{cell:{'<' if left else '>'}{width}}" for cell, width, left in zip(line, widths, lefts, strict=True)
        )
        for line in lines
    ]
    rule = "─" * (sum(widths) + 3 * len(widths) - 1)
    return "\n".join(line.rstrip() for line in [*([title] if title else []), told[0], rule, *told[1:]])


def size(count: int) -> str:
    """As it is told: 18.6 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"
