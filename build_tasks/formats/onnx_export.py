"""The export of a PyTorch network to ONNX, and the check of the graph.

    model.pt ─► TorchScript exporter ─┐
    network  ─► dynamo exporter ──────┴► clean-up ─► check against the source in ONNX Runtime ─► records beside the file

stages/onnx.py chooses the exporter. If a function below raises GraphRefusedError, it tries the other one.
"""

import re
import warnings
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError, first_lines
from build_tasks.formats.declarations import EXPORT_TOOLS
from build_tasks.formats.example_inputs import cases_to_check, example_inputs, format_case
from build_tasks.formats.fp32_comparison import Comparison, InaccurateError
from build_tasks.formats.onnx_clean_up import GraphRefusedError
from build_tasks.formats.onnx_files import close_dimensions, onnx_file, opset, shared_scale, signature_tensors
from build_tasks.formats.onnx_runtime import onnx_session
from build_tasks.formats.serving_interface import open_axes, open_output_axes
from build_tasks.formats.torch_export import export_arguments
from build_tasks.formats.torchscript_trace import TRACED_AWAY
from build_tasks.json_files import write_json
from build_tasks.runtime import threads
from build_tasks.runtime.distributions import versions
from build_tasks.runtime.stage import Paths, Settings
from build_tasks.tensors import BATCH, Interface, tuned_lengths

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch

# The limits of torch 2.14. The dynamo exporter writes 18 and above, and converts to lower opsets if it can.
MAX_OPSET = {"torchscript": 20, "dynamo": 23}
# The opset "auto" begins here. 17 is the first in which LayerNormalization is one operator.
LOWEST_AUTO_OPSET = {"torchscript": 17, "dynamo": 18}


def export(
    exporter: str, source: "torch.nn.Module", names: list[str], interface: Interface, settings: Settings, folder: str
) -> "onnx.ModelProto":
    """Export a network and return the graph as torch writes it.

    Args:
        exporter: "torchscript" or "dynamo".
        source: The loaded model.pt for the first, the network for the second.
        names: The names of the outputs.
        interface: The interface of the spec, resolved.
        settings: The settings of the onnx stage. With opset = "auto", the opset is the lowest from
            LOWEST_AUTO_OPSET on that the exporter can write.
        folder: A folder for the file.
    Raises:
        GraphRefusedError: If the exporter fails, or cannot write the opset.
    """
    if settings["opset"] != "auto":
        return _export_at(settings["opset"], exporter, source, names, interface, settings, folder)
    opset_version, highest = LOWEST_AUTO_OPSET[exporter], settings["max_opset"]
    while True:
        try:
            return _export_at(opset_version, exporter, source, names, interface, settings, folder)
        except GraphRefusedError as error:
            needed = _needed_opset(error)
            if needed is None or not opset_version < needed <= highest:
                raise
            opset_version = needed


def root_cause(error: BaseException) -> str:
    """Return the first line of the error that led to this one. That of the dynamo exporter's own error says nothing.

    The TorchScript exporter appends a node of its graph, which nobody has seen: "[Caused by the value '104 defined in".
    """
    while error.__cause__ is not None:
        error = error.__cause__
    return first_lines(error).partition("[Caused by ")[0].strip()


def _needed_opset(error: BaseException) -> int | None:
    """Return the opset that an exporter's message asks for, None if it names none."""
    found = re.search(r"(?:was added in|try opset) version (\d+)", str(error.__cause__))
    return int(found[1]) if found else None


def _export_at(
    opset_version: int,
    exporter: str,
    source: "torch.nn.Module",
    names: list[str],
    interface: Interface,
    settings: Settings,
    folder: str,
) -> "onnx.ModelProto":
    import onnx
    import torch

    if opset_version > MAX_OPSET[exporter]:
        raise GraphRefusedError(f"writes opset {MAX_OPSET[exporter]} at most")
    try:
        axes_of_outputs = open_output_axes(source, interface)
    except Exception as error:  # a trace may refuse the batch, or answer with another one
        raise GraphRefusedError(f"cannot begin: {root_cause(error)}") from error
    inputs = {each["name"]: open_axes(each["shape"] or []) for each in interface["inputs"]}
    arguments: dict[str, Any] = {
        "opset_version": opset_version,
        "input_names": [*inputs],
        "output_names": names,
    }
    batch = settings["batch_size"]
    if exporter == "dynamo":
        arguments |= {"dynamo": True, "external_data": True, "verbose": False}
        example, dynamic_shapes = export_arguments(source, interface, batch, settings["dynamic_axes"])
        if dynamic_shapes is not None:
            arguments["dynamic_shapes"] = dynamic_shapes
    else:
        arguments |= {"dynamo": False}
        dynamic_axes: dict[str, dict[int, str]] = {
            name: {axis: word or f"{name}_{axis}" for axis, word in axes.items()}
            for name, axes in zip(names, axes_of_outputs, strict=True)
        }
        dynamic_axes |= inputs
        if settings["dynamic_axes"]:
            dynamic_axes = {name: {0: BATCH, **axes} for name, axes in dynamic_axes.items()}
        arguments["dynamic_axes"] = {name: axes for name, axes in dynamic_axes.items() if axes}
        example = tuple(example_inputs(interface, batch, tuned_lengths(interface["dimensions"])))
    torch.backends.mha.set_fastpath_enabled(False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the TorchScript exporter warns at every call that it is deprecated
        try:
            torch.onnx.export(source, example, f"{folder}/model.onnx", **arguments)
            graph = onnx.load(f"{folder}/model.onnx")
        except Exception as error:  # exporters raise errors of many types; the other exporter may succeed
            raise GraphRefusedError(f"failed: {root_cause(error)}") from error
    if opset(graph) != opset_version:
        raise GraphRefusedError(f"wrote opset {opset(graph)}, and could not convert it to {opset_version}")
    if exporter == "dynamo":  # it declares the newest IR version that it knows, which an older server does not read
        graph.ir_version = onnx.helper.find_min_ir_version_for(graph.opset_import, ignore_unknown=True)
    return graph


def check_export(
    graph: "onnx.ModelProto", path: str, comparison: Comparison, interface: Interface, settings: Settings
) -> float:
    """Compare a graph in ONNX Runtime with the network, and return the largest relative error.

    The batches are 1, 2 and the maximum, or the fixed one, and the lengths of open dimensions those of
    `cases_to_check`. The graph then declares the dimensions of its outputs that the exporter left open and that are the
    same in all answers.

    Args:
        graph: The graph, whose outputs are changed.
        path: Its file.
        comparison: The network's outputs.
        interface: The interface of the spec, resolved.
        settings: The settings of the onnx stage.
    Raises:
        GraphRefusedError: If the graph is not valid, does not run, or differs by more than the tolerance.
    """
    import numpy as np
    import onnx

    try:
        onnx.checker.check_model(onnx_file(path), full_check=True)
        run = onnx_session(path, threads.share)
    except Exception as error:  # from onnx or ONNX Runtime, whose errors have no common base class
        raise GraphRefusedError(f"wrote a graph that is not valid: {first_lines(error)}") from error
    batches = sorted({1, 2, settings["max_batch_size"]} if settings["dynamic_axes"] else {settings["batch_size"]})
    names = [each["name"] for each in interface["inputs"]]
    largest = 0.0
    answers: list[list[tuple[int, ...]]] = []

    def run_and_note(batch: "list[Any]") -> "list[np.ndarray]":
        outputs = run({name: np.asarray(each) for name, each in zip(names, batch, strict=True)})
        answers.append([output.shape for output in outputs])
        return outputs

    for size, lengths in cases_to_check(interface, batches):
        case = format_case(size, lengths)
        try:
            largest = max(largest, comparison.check(run_and_note, lengths, size))
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
    has_open_batch = not graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    versions_of_graph = {"opset": opset(graph), "ir_version": graph.ir_version}
    records = {
        "signature": {
            **signature_tensors(graph),
            **versions_of_graph,
            **({"traced_away": f"{constants} {TRACED_AWAY}"} if constants else {}),
            **({"shared_scale": operator} if has_open_batch and (operator := shared_scale(graph)) else {}),
        },
        "export": {"exporter": exporter, "why": why, "clean_up": clean_up, **versions_of_graph},
        "tools": versions(EXPORT_TOOLS),
    }
    for name, record in records.items():
        write_json(outputs[name], record)
