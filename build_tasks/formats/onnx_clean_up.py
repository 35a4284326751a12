"""The clean-up of ONNX graphs: fewer nodes, the same answers.

    graph ─► onnxslim ─► check ─► the result
      │                    └ its answers differ, or it fails
      └► check ─► fold ─► check ─► fuse ─► check ─► the result

onnxslim computes shapes by itself while it folds constants, and some of them are wrong: onnxslim 0.1.98 rounds half a
length down before `Ceil` sees it, and so changes the padding of TensorFlow's "same" convolutions at odd sizes. Some of
its fusions are wrong, too. Folding with ONNX's own shapes, and then the fusions alone, lead to as few nodes, but take
longer.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from build_tasks.errors import first_lines
from build_tasks.formats.onnx_files import strip_metadata

if TYPE_CHECKING:
    import onnx


USUAL = "onnxslim"  # the record of a clean-up of one step


class GraphRefusedError(Exception):
    """A graph is not used. The message continues the name of what wrote the graph."""


def clean_up(
    graph: "onnx.ModelProto", check: "Callable[[onnx.ModelProto], float]"
) -> "tuple[onnx.ModelProto, float, str]":
    """Return the graph with fewer nodes, its error, and how it was cleaned up.

    Args:
        graph: The graph as an exporter or a user wrote it. It may be changed.
        check: Returns the error of a graph, and raises GraphRefusedError if its answers are wrong.
    Raises:
        GraphRefusedError: If the graph is wrong before any step.
    """
    strip_metadata(graph)
    try:
        slimmed = _apply(_slim, graph)
        return slimmed, check(slimmed), USUAL
    except GraphRefusedError as error:
        reasons = [f"onnxslim {error}"]
    error_of_graph = check(graph)
    used = []
    for name, step in STEPS.items():
        try:
            candidate = _apply(step, graph)
            error_of_graph = check(candidate)
        except GraphRefusedError as error:
            reasons.append(f"{name} {error}")
        else:
            graph = candidate
            used.append(name)
    for reason in reasons:
        print(f"clean-up: {reason}")
    return graph, error_of_graph, f"{', then '.join(used) or 'none'}, because {'; '.join(reasons)}"


def _apply(step: "Callable[[onnx.ModelProto], onnx.ModelProto]", graph: "onnx.ModelProto") -> "onnx.ModelProto":
    try:
        return strip_metadata(step(graph))
    except Exception as error:  # these libraries raise errors of many types, and a graph is right without their steps
        raise GraphRefusedError(f"failed: {first_lines(error)}") from error


def _slim(graph: "onnx.ModelProto") -> "onnx.ModelProto":
    import onnxslim

    slimmed: onnx.ModelProto = onnxslim.slim(graph)
    return slimmed


def _fold(graph: "onnx.ModelProto") -> "onnx.ModelProto":
    """Replace what depends on constants alone. ONNX infers shapes, ONNX Runtime computes, until nothing changes."""
    from polygraphy.backend.onnx import fold_constants

    folded: onnx.ModelProto = fold_constants(graph)
    return folded


def _fuse(graph: "onnx.ModelProto") -> "onnx.ModelProto":
    import onnxslim

    fused: onnx.ModelProto = onnxslim.slim(graph, no_shape_infer=True)
    return fused


STEPS = {"constants folded by Polygraphy": _fold, "onnxslim without its shapes": _fuse}
