"""Charts as SVG files. The same data gives the same bytes."""

from typing import Any


def pyplot(salt: str) -> Any:
    """Return matplotlib's pyplot, set up so that the same data gives the same bytes.

    Args:
        salt: Text from which matplotlib derives the ids inside the SVG file.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": salt, "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    return pyplot


def save_svg(figure: Any, path: str) -> None:
    """Write a figure without the date and matplotlib's version, and close it."""
    from matplotlib import pyplot

    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
