"""Tables, wrapped lines and sizes as plain text. It does not use rich, which may be missing.

A terminal gets lines that fit it: they are broken between words, and go on with an indent. A file, a pipe or a log gets
every line as a whole, because programs read it.
"""

import shutil
from collections.abc import Sequence
from typing import NamedTuple, TextIO

INDENT = "    "  # of the second and further lines of a wrapped one
GAP = "   "  # between two columns
MIN_ROOM = 24  # characters of a wrapped column; with less, the column goes to a table below
MAX_RULE = 160  # characters of the line below the header


class Table(NamedTuple):
    """A table that is formatted later, when it is known how wide a line may be. As JSON it is a list.

    Attributes:
        columns: Names of the columns.
        rows: One cell for each column.
        left: Names of the columns that are aligned to the left, besides the first one.
        below: Lines below the table.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    left: Sequence[str] = ()
    below: str = ""

    def format(self, width: int | None = None) -> str:
        """Return the table as text; see `format_table`."""
        text = format_table(self.columns, self.rows, left=self.left, width=width)
        return f"{text}\n{wrap(self.below, width)}" if self.below else text


def format_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    title: str = "",
    left: Sequence[str] = (),
    width: int | None = None,
    keys: int = 1,
) -> str:
    """Return a table as text. Each column is as wide as its widest cell.

    Args:
        columns: Names of the columns.
        rows: One cell for each column.
        title: A line above the table.
        left: Names of the columns that are aligned to the left, besides the first one.
        width: Characters of a line. The last column is wrapped. If that is not enough, the columns that do not fit
            follow in further tables below, each with the key columns again. None: a line may have any length.
        keys: How many columns at the beginning tell the rows apart.
    """
    lines = [list(columns), *([str(cell) for cell in row] for row in rows)]
    parts = [list(range(len(columns)))] if width is None else _split_columns(lines, width, keys)
    tables = [
        _format_columns([[line[index] for index in part] for line in lines], {columns[0], *left}, width)
        for part in parts
    ]
    return "\n".join([*([title] if title else []), "\n\n".join(tables)])


def _split_columns(lines: list[list[str]], width: int, keys: int) -> list[list[int]]:
    """Return the indices of the columns of each table. All tables begin with the key columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first = list(range(keys))
    start = 1 + sum(widths[:keys]) + len(GAP) * (keys - 1)
    parts, used = [first], start
    for index, needed in enumerate(widths[keys:], keys):
        needed = min(needed, MIN_ROOM) if index == len(widths) - 1 else needed
        if used + len(GAP) + needed > width and len(parts[-1]) > keys:
            parts.append(first)
            used = start
        parts[-1] = [*parts[-1], index]
        used += len(GAP) + needed
    return parts


def _format_columns(lines: list[list[str]], left: set[str], width: int | None) -> str:
    """Return a table whose last column is wrapped, if it has text and is too wide.

    Args:
        lines: The names of the columns, and the rows.
        left: Names of the columns that are aligned to the left.
        width: Characters of a line, None for any number.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    wrapped = [[line[-1]] for line in lines]
    room = max(width - sum(widths[:-1]) - len(GAP) * (len(widths) - 1) - 1, MIN_ROOM) if width else widths[-1]
    if lines[0][-1] in left and room < widths[-1]:
        wrapped = [_words(line[-1], room) for line in lines]
        widths[-1] = max(len(text) for texts in wrapped for text in texts)
    alignments = ["<" if name in left else ">" for name in lines[0]]
    formatted = []
    for line, texts in zip(lines, wrapped, strict=True):
        for row in ([*line[:-1], texts[0]], *([""] * (len(line) - 1) + [text] for text in texts[1:])):
            cells = (f"{cell:{side}{size}}" for cell, side, size in zip(row, alignments, widths, strict=True))
            formatted.append(f" {GAP.join(cells)}".rstrip())
        if line is lines[0]:
            rule = "─" * (sum(widths) + len(GAP) * len(widths) - 1)
            formatted.append(rule[: width or MAX_RULE])
    return "\n".join(formatted)


def _words(text: str, width: int, indent: str = "") -> list[str]:
    """Return the lines of a text that is wrapped between words.

    A path or URL that is longer than a line goes on after one of its slashes, since a terminal would break it anywhere.
    Every other word stays whole.
    """
    import re

    lines = [""]
    for word in re.findall(r" *[^ ]+", text):
        if not lines[-1] or len(lines[-1]) + len(word) <= width:
            lines[-1] += word
        else:
            lines.append(indent + word.lstrip(" "))
        while len(lines[-1]) > width and (end := lines[-1].rfind("/", 0, width) + 1):
            lines[-1:] = [lines[-1][:end], indent + lines[-1][end:]]
    return lines


def wrap(text: str, width: int | None) -> str:
    """Return a text whose lines are wrapped between words, with an indent.

    A command that is about to run ("+ docker run …") stays one line, so that it can be copied.
    """
    if width is None or all(len(line) <= width for line in text.split("\n")):
        return text
    return "\n".join(part for line in text.split("\n") for part in _wrapped(line, width))


def _wrapped(line: str, width: int) -> list[str]:
    """Return the lines of a wrapped one. If it has columns, they go on below the last one in the left half."""
    if len(line) <= width or line.startswith("+ "):
        return [line]
    import re

    columns = [match.end() for match in re.finditer(r"\S {2,}(?=\S)", line[: width // 2 + 1])]
    indent = columns[-1] if columns else len(line) - len(line.lstrip(" ")) + len(INDENT)
    return _words(line, width, " " * indent)


def terminal_width(stream: TextIO) -> int | None:
    """Return the characters of a line of a terminal; None if the stream is no terminal."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def format_size(count: int) -> str:
    """Return a number of bytes with its unit, "18.6 MB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"
