"""The error after each node of a graph of reduced precision."""

import math
from typing import TYPE_CHECKING, Any

from build_tasks.formats.onnx_files import onnx_file
from build_tasks.formats.onnx_runtime import ONNX_MODULES, emulate_on_cpu, session_without_optimizations
from build_tasks.runtime.stage import Paths
from build_tasks.spec.model import Model
from build_tasks.text_table import format_table
from build_tasks.verification.tolerance import ROUNDOFF

if TYPE_CHECKING:
    import onnx

# The modules of the project that decide the errors of layers, for the fingerprint of the stages that compute them.
LAYER_MODULES = (
    "build_tasks.formats.layer_errors",
    "build_tasks.text_table",
    "build_tasks.verification.tolerance",
    *ONNX_MODULES,
)
SAMPLES = 4  # that are looked at: one after the other, for every tensor of a graph is in memory at once
JUMP = 8  # times the largest error of a node's inputs, above which its own is not their fault
COARSENESS = 2**-7  # of int8 and fp8, in the place of the unit roundoff
SHOWN = 12  # layers that are shown of all
Layer = dict[str, Any]  # node, operator, its place in the graph; error, and the largest before it (None: infinite)


def compare_layers(source: str, reduced: str, samples: str, precision: str) -> dict[str, Any]:
    """The relative L2 error of every node's output against the fp32 graph's, worst first, and where it first jumps.

    Nodes are told by their names. What the conversion renamed or fused away is not compared, but counted.
    """
    import numpy as np
    import onnx
    from polygraphy.json import load_json

    from build_tasks.tensors import INPUT

    fp32, low = (onnx.load(onnx_file(path)) for path in (source, reduced))
    ours = {node.name: node for node in low.graph.node}
    ends = [output.name for output in fp32.graph.output]  # before every tensor is marked as one
    pairs = {n.name: (n, ours[n.name]) for n in fp32.graph.node if n.name in ours and n.op_type != "Constant"}
    wanted = {name: list(zip(a.output, b.output, strict=False)) for name, (a, b) in pairs.items()}
    runs = [
        run_with_outputs(graph, sorted({pair[index] for outputs in wanted.values() for pair in outputs}))
        for index, graph in enumerate((fp32, low))
    ]
    batches: np.ndarray = load_json(samples)[0][INPUT][:SAMPLES]
    size = fp32.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1
    off: dict[str, float] = {}
    norm: dict[str, float] = {}
    largest: dict[str, float] = {}
    for sample in batches:
        expected, found = (run(np.stack([sample] * size)) for run in runs)
        for outputs in wanted.values():
            for a, b in outputs:
                if not np.issubdtype(expected[a].dtype, np.floating):
                    continue
                exact, answer = (values.astype(np.float64) for values in (expected[a], found[b]))
                differing = exact != answer  # and not infinities that fp32 has as well: attention masks are made so
                with np.errstate(invalid="ignore", over="ignore"):
                    difference = float(((answer[differing] - exact[differing]) ** 2).sum())
                off[a] = off.get(a, 0.0) + (difference if math.isfinite(difference) else math.inf)
                finite = exact[np.isfinite(exact)]
                norm[a] = norm.get(a, 0.0) + float((finite**2).sum())
                largest[a] = max(largest.get(a, 0.0), float(np.abs(finite).max(initial=0.0)))
    errors = {tensor: math.sqrt(off[tensor] / norm[tensor]) if norm[tensor] else 0.0 for tensor in off}
    found_layers, carried = [], carried_errors(fp32, ends, errors)
    lost = not all(map(math.isfinite, errors.values()))  # then no error that is finite is to blame
    jump = None
    for place, node in enumerate(fp32.graph.node):
        mine = [tensor for tensor in node.output if tensor in errors] if node.name in wanted else []
        if not mine:
            continue
        error = max(errors[tensor] for tensor in mine)
        before = max((errors[tensor] for tensor in node.input if tensor in errors), default=0.0)
        after = max(carried[tensor] for tensor in mine)
        to_blame = not lost or not math.isfinite(error)
        if jump is None and to_blame and is_jump(error, max(before, ROUNDOFF.get(precision, COARSENESS)), after):
            jump = node.name
        found_layers.append(
            {
                "node": node.name,
                "operator": node.op_type,
                "place": place,
                "error": _finite(error),
                "before": _finite(before),
                "largest": max(largest[tensor] for tensor in mine),
            }
        )
    found_layers.sort(key=lambda layer: (-_number(layer["error"]), layer["place"]))
    return {
        "precision": precision,
        "samples": len(batches),
        "not_compared": len([n for n in fp32.graph.node if n.op_type != "Constant"]) - len(found_layers),
        "first_jump": jump,
        "layers": found_layers,
    }


def carried_errors(graph: "onnx.ModelProto", ends: list[str], errors: dict[str, float]) -> dict[str, float]:
    """The largest error after the nodes that take a tensor; of a graph's outputs, which are the ends, their own."""
    after = {name: errors.get(name, 0.0) for name in ends}
    for node in graph.graph.node:
        theirs = max((errors[tensor] for tensor in node.output if tensor in errors), default=0.0)
        for tensor in node.input:
            after[tensor] = max(after.get(tensor, 0.0), theirs)
    return {tensor: after.get(tensor, 0.0) for tensor in errors}


def is_jump(error: float, before: float, after: float) -> bool:
    """Whether an error begins with a node, and what comes after it does not wash it out."""
    if not math.isfinite(error):
        return math.isfinite(before)
    return error > JUMP * before and after > error / JUMP


def run_with_outputs(graph: "onnx.ModelProto", tensors: list[str]) -> Any:
    """The graph as a function from a batch to the tensors of these names."""
    from polygraphy.backend.onnx import ModifyOutputs

    runnable = emulate_on_cpu(graph)
    del runnable.graph.value_info[:]  # modelopt's may contradict the graph
    session = session_without_optimizations(ModifyOutputs(runnable, outputs=tensors)())
    return lambda batch: dict(zip(tensors, session(batch), strict=True))


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None  # JSON has no infinity


def _number(error: float | None) -> float:
    return math.inf if error is None else error


def _format_error(error: float | None) -> str:
    return "NaN or infinity" if error is None else f"{error:.1e}"


def first_jump(report: dict[str, Any]) -> str | None:
    """The first layer, in the order of the graph, whose error is not explained by those before it."""
    for layer in report["layers"]:
        if layer["node"] == report["first_jump"]:
            error, before = (_format_error(layer[key]) for key in ("error", "before"))
            return f"the error jumps at {layer['node']} ({layer['operator']}), from {before} to {error}"
    return None


def format_layers(found: list[Layer]) -> str:
    rows = [
        (layer["node"], layer["operator"], layer["place"], _format_error(layer["error"]),
         _format_error(layer["before"]),
         f"{layer['largest']:.3g}")
        for layer in found[:SHOWN]
    ]  # fmt: skip
    more = f"\n… and {len(found) - SHOWN} more with less" if len(found) > SHOWN else ""
    return format_table(("node", "operator", "place", "error after it", "before it", "largest value"), rows) + more


def inputs_of(model: Model, precision: str) -> Paths:
    return {
        "model.onnx": model.artifact("model.onnx"),
        "graph": model.artifact(model.graph_file(precision)),
        "samples": model.artifact("samples.json"),
    }
