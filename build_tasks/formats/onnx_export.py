"""The export of a PyTorch network to ONNX, and the check of the graph.

    model.pt ─► TorchScript exporter ─┐
    network  ─► dynamo exporter ──────┴► clean-up ─► check against the source in ONNX Runtime ─► records beside the file

stages/onnx.py chooses the exporter. If a function below raises GraphRefusedError, it tries the other one.
"""

import re
import warnings
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError, first_lines
from build_tasks.formats import pytorch_network
from build_tasks.formats.fp32_comparison import COMPARISON_MODULES, Comparison, InaccurateError
from build_tasks.formats.onnx_clean_up import CLEAN_UP_MODULES, CLEAN_UP_TOOLS, GraphRefusedError
from build_tasks.formats.onnx_files import close_dimensions, onnx_file, opset, signature_tensors
from build_tasks.formats.onnx_runtime import ONNX_MODULES, onnx_session
from build_tasks.formats.torchscript_trace import TRACED_AWAY
from build_tasks.json_files import write_json
from build_tasks.runtime import threads
from build_tasks.runtime.distributions import versions
from build_tasks.runtime.stage import Paths, Settings
from build_tasks.tensors import INPUT, OUTPUT

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch

# The modules of the project that affect the exported graph, for the fingerprint of the stage `onnx`.
EXPORT_MODULES = (
    "build_tasks.formats.onnx_export",
    *CLEAN_UP_MODULES,
    *COMPARISON_MODULES,
    *pytorch_network.NETWORK_MODULES,
    *ONNX_MODULES,
)
TOOLS = ("torch", "timm", "onnxscript", *CLEAN_UP_TOOLS)
# The limits of torch 2.14. The dynamo exporter writes 18 and above, and converts to lower opsets if it can.
MAX_OPSET = {"torchscript": 20, "dynamo": 23}
# The opset "auto" begins here. 17 is the first in which LayerNormalization is one operator.
LOWEST_AUTO_OPSET = {"torchscript": 17, "dynamo": 18}


def export(
    exporter: str, source: "torch.nn.Module", shape: tuple[int, int, int], settings: Settings, folder: str
) -> "onnx.ModelProto":
    """Export a network and return the graph as torch writes it.

    Args:
        exporter: "torchscript" or "dynamo".
        source: The loaded model.pt for the first, the network for the second.
        shape: (channels, height, width) of one input.
        settings: The settings of the onnx stage. With opset = "auto", the opset is the lowest from
            LOWEST_AUTO_OPSET on that the exporter can write.
        folder: A folder for the file.
    Raises:
        GraphRefusedError: If the exporter fails, or cannot write the opset.
    """
    if settings["opset"] != "auto":
        return _export_at(settings["opset"], exporter, source, shape, settings, folder)
    opset_version, highest = LOWEST_AUTO_OPSET[exporter], settings["max_opset"]
    while True:
        try:
            return _export_at(opset_version, exporter, source, shape, settings, folder)
        except GraphRefusedError as error:
            needed = _needed_opset(error)
            if needed is None or not opset_version < needed <= highest:
                raise
            opset_version = needed


def root_cause(error: BaseException) -> str:
    """Return the first line of the error that led to this one. That of the dynamo exporter's own error says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_lines(error)


def _needed_opset(error: BaseException) -> int | None:
    """Return the opset that an exporter's message asks for, None if it names none."""
    found = re.search(r"(?:was added in|try opset) version (\d+)", str(error.__cause__))
    return int(found[1]) if found else None


def _export_at(
    opset_version: int,
    exporter: str,
    source: "torch.nn.Module",
    shape: tuple[int, int, int],
    settings: Settings,
    folder: str,
) -> "onnx.ModelProto":
    import onnx
    import torch

    if opset_version > MAX_OPSET[exporter]:
        raise GraphRefusedError(f"writes opset {MAX_OPSET[exporter]} at most")
    input_format = settings["interface"]["format"]
    batch = pytorch_network.example_input(shape, settings["batch_size"], input_format)
    try:
        axes_of_outputs = pytorch_network.size_dependent_axes(source, shape, settings["sizes"], input_format)
    except Exception as error:  # a trace may refuse the batch, or answer with another one
        raise GraphRefusedError(f"cannot begin: {root_cause(error)}") from error
    height, width = pytorch_network.spatial_axes(input_format)
    names = [OUTPUT.format(index) for index in range(len(axes_of_outputs))]
    arguments: dict[str, Any] = {
        "opset_version": opset_version,
        "input_names": [INPUT],
        "output_names": names,
    }
    if exporter == "dynamo":
        arguments |= {"dynamo": True, "external_data": True, "verbose": False}
        dimensions = {}
        if settings["dynamic_axes"]:
            # torch.export fixes a dimension of size one, also if it is declared as open.
            batch = pytorch_network.example_input(shape, max(2, settings["batch_size"]), input_format)
            dimensions[0] = torch.export.Dim("batch")
        if settings["sizes"]:
            (min_height, min_width), (max_height, max_width) = settings["sizes"]
            dimensions[height] = torch.export.Dim("height", min=min_height, max=max_height)
            dimensions[width] = torch.export.Dim("width", min=min_width, max=max_width)
        if dimensions:
            arguments["dynamic_shapes"] = (dimensions,)
    else:
        arguments |= {"dynamo": False}
        dynamic_axes = {
            name: {axis: f"{name}_{axis}" for axis in axes} for name, axes in zip(names, axes_of_outputs, strict=True)
        }
        dynamic_axes[INPUT] = {height: "height", width: "width"} if settings["sizes"] else {}
        if settings["dynamic_axes"]:
            dynamic_axes = {name: {0: "batch", **axes} for name, axes in dynamic_axes.items()}
        arguments["dynamic_axes"] = {name: axes for name, axes in dynamic_axes.items() if axes}
    torch.backends.mha.set_fastpath_enabled(False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the TorchScript exporter warns at every call that it is deprecated
        try:
            torch.onnx.export(source, (batch,), f"{folder}/model.onnx", **arguments)
            graph = onnx.load(f"{folder}/model.onnx")
        except Exception as error:  # exporters raise errors of many types; the other exporter may succeed
            raise GraphRefusedError(f"failed: {root_cause(error)}") from error
    if opset(graph) != opset_version:
        raise GraphRefusedError(f"wrote opset {opset(graph)}, and could not convert it to {opset_version}")
    if exporter == "dynamo":  # it declares the newest IR version that it knows, which an older server does not read
        graph.ir_version = onnx.helper.find_min_ir_version_for(graph.opset_import, ignore_unknown=True)
    return graph


def check_export(
    graph: "onnx.ModelProto", path: str, comparison: Comparison, shape: tuple[int, int, int], settings: Settings
) -> float:
    """Compare a graph in ONNX Runtime with the network, and return the largest relative error.

    The batches are 1, 2 and the maximum, or the fixed one. The first of them also runs at the smallest and largest
    size of the spec. The graph then declares the dimensions of its outputs that the exporter left open and that are the
    same in all answers.

    Args:
        graph: The graph, whose outputs are changed.
        path: Its file.
        comparison: The network's outputs.
        shape: (channels, height, width) of one input.
        settings: The settings of the onnx stage.
    Raises:
        GraphRefusedError: If the graph is not valid, does not run, or differs by more than the tolerance.
    """
    import onnx

    try:
        onnx.checker.check_model(onnx_file(path), full_check=True)
        run = onnx_session(path, threads.share)
    except Exception as error:  # from onnx or ONNX Runtime, whose errors have no common base class
        raise GraphRefusedError(f"wrote a graph that is not valid: {first_lines(error)}") from error
    batches = sorted({1, 2, settings["max_batch_size"]} if settings["dynamic_axes"] else {settings["batch_size"]})
    _, *other_shapes = pytorch_network.shapes_to_check(shape, settings["sizes"])
    largest = 0.0
    answers: list[list[tuple[int, ...]]] = []

    def run_and_note(batch: "torch.Tensor") -> "list[np.ndarray]":
        outputs = run(batch.numpy())
        answers.append([output.shape for output in outputs])
        return outputs

    cases = [*((size, shape) for size in batches), *((batches[0], other) for other in other_shapes)]
    for size, dims in cases:
        case = f"batch {size}" + (f" of {dims[1]}x{dims[2]}" if other_shapes else "")
        try:
            largest = max(largest, comparison.check(run_and_note, dims, size))
        except InaccurateError as error:
            raise GraphRefusedError(f"wrote a graph that differs from the network at {case} {error}") from error
        except UserError:
            raise
        except Exception as error:
            raise GraphRefusedError(f"wrote a graph that does not run at {case}: {first_lines(error)}") from error
    close_dimensions(graph, answers)
    return largest


def write_records(
    graph: "onnx.ModelProto", outputs: Paths, exporter: str | None, why: str, clean_up: str, constants: str = ""
) -> None:
    """Write the files beside model.onnx: its signature, its export, and the versions of the tools.

    Args:
        graph: The graph.
        outputs: The paths of the files.
        exporter: The exporter that wrote the graph. None if the source is an ONNX file.
        why: Why this exporter was used.
        clean_up: How the graph was cleaned up.
        constants: The lines of the user's code whose decisions the graph leaves out.
    """
    versions_of_graph = {"opset": opset(graph), "ir_version": graph.ir_version}
    records = {
        "signature": {
            **signature_tensors(graph),
            **versions_of_graph,
            **({"traced_away": f"{constants} {TRACED_AWAY}"} if constants else {}),
        },
        "export": {"exporter": exporter, "why": why, "clean_up": clean_up, **versions_of_graph},
        "tools": versions(TOOLS),
    }
    for name, record in records.items():
        write_json(outputs[name], record)
