"""Tables and sizes as plain text. It does not use rich, which may be missing."""

from collections.abc import Sequence


def format_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "", left: Sequence[str] = ()
) -> str:
    """Return a table as text. Each column is as wide as its widest cell.

    Args:
        columns: Names of the columns.
        rows: One cell for each column.
        title: A line above the table.
        left: Names of the columns that are aligned to the left, besides the first one.
    """
    lines = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    alignments = ["<" if index == 0 or column in left else ">" for index, column in enumerate(columns)]
    header, *body = (
        " " + "   ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, alignments, widths, strict=True))
        for line in lines
    )
    rule = "─" * (sum(widths) + 3 * len(widths) - 1)
    return "\n".join(line.rstrip() for line in [*([title] if title else []), header, rule, *body])


def format_size(count: int) -> str:
    """Return a number of bytes with its unit, "18.6 MB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"
