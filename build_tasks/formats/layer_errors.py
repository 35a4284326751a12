"""The error after each node of a graph of reduced precision, and the node where the error begins.

model.onnx ──────────────┐
model.<precision>.onnx ──┴► every tensor as an output, in ONNX Runtime ─► LayerReport: errors by node, worst first
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypedDict

from build_tasks.runtime.stage import Paths
from build_tasks.spec.model import Model
from build_tasks.tensors import Feed, batch_of, take
from build_tasks.text_table import Table
from build_tasks.verification.tolerance import ROUNDOFF

if TYPE_CHECKING:
    import numpy as np
    import onnx

    RunTensors = Callable[[Feed], dict[str, np.ndarray]]  # from a batch to tensors by name

MAX_SAMPLES = 4  # run one after the other, because every tensor of a graph is in memory at once
JUMP_FACTOR = 8  # an error begins with a node if it is larger than the errors of the node's inputs by this factor
QUANTIZED_ROUNDOFF = 2**-7  # replaces the unit roundoff for int8 and fp8
MAX_ROWS = 12  # maximum number of rows of a table


class LayerError(TypedDict):
    """The relative L2 error after a node. None stands for NaN or infinity."""

    node: str
    operator: str
    place: int  # position in the graph
    error: float | None
    before: float | None  # largest error of its inputs
    largest: float  # largest absolute value of its outputs in fp32


class LayerReport(TypedDict):
    """The content of <graph>.layers.json."""

    precision: str
    samples: int
    not_compared: int  # nodes that the conversion renamed or fused
    first_jump: str | None  # the first node with an error that its inputs do not explain
    layers: list[LayerError]  # largest error first


def compare_layers(source: str, reduced: str, samples: str, precision: str) -> LayerReport:
    """Compare the output of every node with the same node's output in the fp32 graph. Nodes are matched by name.

    Args:
        source: The fp32 graph.
        reduced: The graph of reduced precision.
        samples: Polygraphy's file of the accuracy samples.
        precision: The precision of the second graph.
    """
    import onnx
    from polygraphy.json import load_json

    from build_tasks.formats.onnx_files import onnx_file

    fp32, low = (onnx.load(onnx_file(path)) for path in (source, reduced))
    low_nodes = {node.name: node for node in low.graph.node}
    outputs = [output.name for output in fp32.graph.output]  # before every tensor becomes an output
    nodes = [node for node in fp32.graph.node if node.op_type != "Constant"]
    tensors = {  # the name of a tensor in the fp32 graph -> its name in the other
        exact: rounded
        for node in nodes
        if node.name in low_nodes
        for exact, rounded in zip(node.output, low_nodes[node.name].output, strict=False)
    }
    runs = run_with_outputs(fp32, sorted(tensors)), run_with_outputs(low, sorted({*tensors.values()}))
    batch = take(load_json(samples)[0], slice(MAX_SAMPLES))
    errors, largest = tensor_errors(*runs, tensors, batch, fixed_batch=_batch_of(fp32))
    carried = carried_errors(fp32, outputs, errors)
    infinite = not all(map(math.isfinite, errors.values()))  # then only an infinite error can be the first jump
    layers: list[LayerError] = []
    jump = None
    for place, node in enumerate(fp32.graph.node):
        compared = [tensor for tensor in node.output if tensor in errors]
        if not compared:
            continue
        error = max(errors[tensor] for tensor in compared)
        before = max((errors[tensor] for tensor in node.input if tensor in errors), default=0.0)
        after = max(carried[tensor] for tensor in compared)
        expected = max(before, ROUNDOFF.get(precision, QUANTIZED_ROUNDOFF))
        if jump is None and (not infinite or not math.isfinite(error)) and is_jump(error, expected, after):
            jump = node.name
        layers.append(
            {
                "node": node.name,
                "operator": node.op_type,
                "place": place,
                "error": _finite_or_none(error),
                "before": _finite_or_none(before),
                "largest": max(largest[tensor] for tensor in compared),
            }
        )
    layers.sort(key=lambda layer: (-math.inf if layer["error"] is None else -layer["error"], layer["place"]))
    return {
        "precision": precision,
        "samples": batch_of(batch),
        "not_compared": len(nodes) - len(layers),
        "first_jump": jump,
        "layers": layers,
    }


def tensor_errors(
    run_exact: "RunTensors", run_rounded: "RunTensors", tensors: dict[str, str], batch: Feed, fixed_batch: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the relative L2 error over all samples, and the largest absolute value in fp32, of each float tensor.

    Args:
        run_exact: Runs the fp32 graph.
        run_rounded: Runs the graph of reduced precision.
        tensors: The name of each tensor in the fp32 graph, and its name in the other.
        batch: The samples. Each is run alone.
        fixed_batch: The batch size that the graphs take. A sample is repeated to it.
    """
    import numpy as np

    squares: dict[str, float] = {}  # sum of the squared differences
    norms: dict[str, float] = {}  # sum of the squared values
    largest: dict[str, float] = {}
    for index in range(batch_of(batch)):
        repeated = take(batch, [index] * fixed_batch)
        expected, found = run_exact(repeated), run_rounded(repeated)
        for name, low_name in tensors.items():
            if not np.issubdtype(expected[name].dtype, np.floating):
                continue
            exact, rounded = expected[name].astype(np.float64), found[low_name].astype(np.float64)
            differing = exact != rounded  # without infinities that fp32 has as well, as in attention masks
            with np.errstate(invalid="ignore", over="ignore"):
                square = float(((rounded[differing] - exact[differing]) ** 2).sum())
            squares[name] = squares.get(name, 0.0) + (square if math.isfinite(square) else math.inf)
            finite = exact[np.isfinite(exact)]
            norms[name] = norms.get(name, 0.0) + float((finite**2).sum())
            largest[name] = max(largest.get(name, 0.0), float(np.abs(finite).max(initial=0.0)))
    return {name: math.sqrt(squares[name] / norms[name]) if norms[name] else 0.0 for name in squares}, largest


def _batch_of(graph: "onnx.ModelProto") -> int:
    return graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1


def carried_errors(graph: "onnx.ModelProto", outputs: list[str], errors: dict[str, float]) -> dict[str, float]:
    """Return the largest error after the nodes that read a tensor, by tensor. For an output it is its own error."""
    after = {name: errors.get(name, 0.0) for name in outputs}
    for node in graph.graph.node:
        error = max((errors[tensor] for tensor in node.output if tensor in errors), default=0.0)
        for tensor in node.input:
            after[tensor] = max(after.get(tensor, 0.0), error)
    return {tensor: after.get(tensor, 0.0) for tensor in errors}


def is_jump(error: float, before: float, after: float) -> bool:
    """Whether an error begins with a node, and the nodes after it do not remove it."""
    if not math.isfinite(error):
        return math.isfinite(before)
    return error > JUMP_FACTOR * before and after > error / JUMP_FACTOR


def run_with_outputs(graph: "onnx.ModelProto", tensors: list[str]) -> "RunTensors":
    """Return the graph as a function from a batch to the tensors of these names."""
    from polygraphy.backend.onnx import ModifyOutputs

    from build_tasks.formats.onnx_runtime import emulate_on_cpu, session_without_optimizations

    runnable = emulate_on_cpu(graph)
    del runnable.graph.value_info[:]  # modelopt's may contradict the graph
    session = session_without_optimizations(ModifyOutputs(runnable, outputs=tensors)())
    return lambda feed: dict(zip(tensors, session(feed), strict=True))


def _finite_or_none(error: float) -> float | None:
    return error if math.isfinite(error) else None  # JSON has no infinity


def _format_error(error: float | None) -> str:
    return "NaN or infinity" if error is None else f"{error:.1e}"


def first_jump(report: LayerReport) -> str | None:
    """Describe the first node, in the order of the graph, with an error that its inputs do not explain."""
    for layer in report["layers"]:
        if layer["node"] == report["first_jump"]:
            error, before = _format_error(layer["error"]), _format_error(layer["before"])
            return f"the error jumps at {layer['node']} ({layer['operator']}), from {before} to {error}"
    return None


def layers_table(layers: list[LayerError]) -> Table:
    """The layers with the largest errors as a table."""
    rows = [
        (layer["node"], layer["operator"], layer["place"], _format_error(layer["error"]),
         _format_error(layer["before"]),
         f"{layer['largest']:.3g}")
        for layer in layers[:MAX_ROWS]
    ]  # fmt: skip
    more = f"… and {len(layers) - MAX_ROWS} more with smaller errors" if len(layers) > MAX_ROWS else ""
    columns = ("node", "operator", "place", "error after it", "before it", "largest value")
    return Table(columns, rows, left=("operator",), below=more)


def inputs_of(model: Model, precision: str) -> Paths:
    """Return the files that the errors of layers are computed from, by the name of a stage's input."""
    return {
        "model.onnx": model.artifact("model.onnx"),
        "graph": model.artifact(model.graph_file(precision)),
        "samples": model.artifact("samples.json"),
    }
