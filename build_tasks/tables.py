"""Tables for people, as text."""

from collections.abc import Sequence


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "", left: Sequence[str] = ()) -> str:
    """Rows under their columns; the first column and those in `left` to the left, the others to the right.

    As wide as it needs to be.
    """
    import io

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", title_style="", show_edge=False)
    for index, column in enumerate(columns):
        grid.add_column(column, justify="left" if index == 0 or column in left else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*(str(cell).replace("[", "\\[") for cell in row))
    console = Console(file=io.StringIO(), width=400, no_color=True)
    console.print(grid)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]  # it is a StringIO
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def size(count: int) -> str:
    """As it is told: 18.6 MB."""
    for unit, bytes in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= bytes:
            return f"{count / bytes:.1f} {unit}"
    return f"{count} B"
