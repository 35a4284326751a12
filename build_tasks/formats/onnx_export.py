"""From a PyTorch network to a checked ONNX graph."""

import warnings
from typing import TYPE_CHECKING, Any

from build_tasks.errors import first_lines
from build_tasks.formats import pytorch_network
from build_tasks.formats.onnx_files import onnx_file, opset, signature_tensors, strip_metadata
from build_tasks.formats.onnx_runtime import ONNX_MODULES, onnx_session
from build_tasks.json_files import write_json
from build_tasks.runtime import threads
from build_tasks.runtime.distributions import versions
from build_tasks.runtime.stage import Paths, Settings
from build_tasks.tensors import INPUT, OUTPUT
from build_tasks.verification.tolerance import float_outputs, max_relative_error, tolerance

if TYPE_CHECKING:
    import onnx
    import torch

# The modules of the project that decide what is exported, for the fingerprint of the stage that does it.
EXPORT_MODULES = ("build_tasks.formats.onnx_export", *pytorch_network.NETWORK_MODULES, *ONNX_MODULES)
TOOLS = ("torch", "timm", "onnx", "onnxscript", "onnxslim", "onnxruntime")
# Of torch 2.14. The dynamo exporter writes 18 and above, and converts down where it can.
HIGHEST_OPSET = {"torchscript": 20, "dynamo": 23}


class ExporterRefusedError(Exception):
    """Why one exporter's result is not used; the message continues "the … exporter"."""


def export(
    exporter: str, source: "torch.nn.Module", shape: tuple[int, int, int], settings: Settings, folder: str
) -> "onnx.ModelProto":
    """The graph as torch writes it, into an empty folder."""
    import onnx
    import torch

    if settings["opset"] > HIGHEST_OPSET[exporter]:
        raise ExporterRefusedError(f"writes opset {HIGHEST_OPSET[exporter]} at most")
    input_format = settings["interface"]["format"]
    batch = pytorch_network.example_input(shape, settings["batch_size"], input_format)
    opened = pytorch_network.size_dependent_axes(source, shape, settings["sizes"], input_format)
    height, width = pytorch_network.spatial_axes(input_format)
    names = [OUTPUT.format(index) for index in range(len(opened))]
    arguments: dict[str, Any] = {
        "opset_version": settings["opset"],
        "input_names": [INPUT],
        "output_names": names,
    }
    if exporter == "dynamo":
        arguments |= {"dynamo": True, "external_data": True, "verbose": False}
        dimensions = {}
        if settings["dynamic_axes"]:
            # torch.export specialises a dimension of size one, whatever it is told.
            batch = pytorch_network.example_input(shape, max(2, settings["batch_size"]), input_format)
            dimensions[0] = torch.export.Dim("batch")
        if settings["sizes"]:
            (lowest, narrowest), (highest, widest) = settings["sizes"]
            dimensions[height] = torch.export.Dim("height", min=lowest, max=highest)
            dimensions[width] = torch.export.Dim("width", min=narrowest, max=widest)
        if dimensions:
            arguments["dynamic_shapes"] = (dimensions,)
    else:
        arguments |= {"dynamo": False}
        axes = {name: {axis: f"{name}_{axis}" for axis in also} for name, also in zip(names, opened, strict=True)}
        axes[INPUT] = {height: "height", width: "width"} if settings["sizes"] else {}
        if settings["dynamic_axes"]:
            axes = {name: {0: "batch", **others} for name, others in axes.items()}
        arguments["dynamic_axes"] = {name: others for name, others in axes.items() if others}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the TorchScript exporter announces its end at every call
        try:
            torch.onnx.export(source, (batch,), f"{folder}/model.onnx", **arguments)
            graph = onnx.load(f"{folder}/model.onnx")
        except Exception as error:  # any exporter error means: try the other, or tell
            raise ExporterRefusedError(f"failed: {first_lines(error)}") from error
    if opset(graph) != settings["opset"]:
        raise ExporterRefusedError(f"wrote opset {opset(graph)}, and could not convert it to {settings['opset']}")
    return graph


def slim(graph: "onnx.ModelProto") -> "onnx.ModelProto":
    """Simplified, and without what tells of the machine."""
    import onnxslim

    return strip_metadata(onnxslim.slim(graph))


def check_export(
    path: str, script: "torch.nn.Module", module: "torch.nn.Module", shape: tuple[int, int, int], settings: Settings
) -> float:
    """The largest relative error against model.pt, at batches 1, 2 and the maximum (or the fixed one), at all sizes."""
    import onnx

    try:
        onnx.checker.check_model(onnx_file(path), full_check=True)
        run = onnx_session(path, threads.share)
    except Exception as error:  # of onnx, or of ONNX Runtime, which have no common base
        raise ExporterRefusedError(f"wrote a graph that is refused: {first_lines(error)}") from error
    batches = sorted({1, 2, settings["max_batch_size"]} if settings["dynamic_axes"] else {settings["batch_size"]})
    others = pytorch_network.shapes_to_check(shape, settings["sizes"])[1:]
    limit = tolerance("fp32", pytorch_network.sensitivity(module, shape, batches[0]))
    worst = 0.0
    for size, of in (*((size, shape) for size in batches), *((batches[0], other) for other in others)):
        batch = pytorch_network.example_input(of, size, settings["interface"]["format"], seed=size)
        at = f"batch {size}" + (f" of {of[1]}x{of[2]}" if others else "")
        expected = [answer.numpy() for answer in pytorch_network.forward(script, batch)]
        try:
            found = run(batch.numpy())
        except Exception as error:
            raise ExporterRefusedError(f"wrote a graph that does not run at {at}: {first_lines(error)}") from error
        worst = max(worst, max_relative_error(float_outputs(found), float_outputs(expected)))
        if not worst <= limit:
            other = "the source" if script is module else "model.pt"
            raise ExporterRefusedError(
                f"wrote a graph that differs from {other} by {worst:.1e} at {at} (limit {limit:.0e})"
            )
    return worst


def write_records(graph: "onnx.ModelProto", outputs: Paths, exporter: str | None, why: str) -> None:
    """What is written beside model.onnx: its signature, how it came about, and by which tools."""
    known = {"opset": opset(graph), "ir_version": graph.ir_version}
    records = {
        "signature": {**signature_tensors(graph), **known},
        "export": {"exporter": exporter, "why": why, **known},
        "tools": versions(TOOLS),
    }
    for name, record in records.items():
        write_json(outputs[name], record)
