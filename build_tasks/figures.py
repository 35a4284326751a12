"""Charts as SVG files: the same figures give the same bytes."""

from typing import Any


def pyplot(salt: str) -> Any:
    """matplotlib's pyplot, for a picture of the same bytes for the same figures. salt: of the names inside."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": salt, "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    return pyplot


def save_svg(figure: Any, path: str) -> None:
    """Such a picture, without the time and the version that made it; closed then."""
    from matplotlib import pyplot

    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
