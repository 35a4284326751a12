"""onnx: model.pt -> model.onnx, model.onnx.signature.json, model.onnx.export.json (which exporter, and why)

model.pt ──► TorchScript exporter ──► slim ──► check ──► model.onnx
                 │ fails, or does not agree              ▲
network  ──► dynamo exporter ──► slim ──► check ─────────┘
"""

import json
import os
import tempfile
import warnings
from typing import TYPE_CHECKING, Any

from build_tasks import architecture, files, overrides, threads
from build_tasks.compare import (
    INPUT,
    LARGEST_MESSAGE,
    OUTPUT,
    continuous,
    disagreement,
    np_type,
    onnx_file,
    onnx_session,
    tolerance,
)
from build_tasks.errors import UserError, first_lines
from build_tasks.spec import Model, settings
from build_tasks.stage import Build, Notes, Paths, Settings, Stage, code_of, versions

if TYPE_CHECKING:
    import onnx
    import torch


TOOLS = ("torch", "timm", "onnx", "onnxscript", "onnxslim", "onnxruntime")

# Of torch 2.14. The dynamo exporter writes 18 and above, and converts down where it can.
HIGHEST_OPSET = {"torchscript": 20, "dynamo": 23}


def task(model: Model) -> dict[str, Any]:
    inputs = {"model": model.artifact("model.pt"), "weights": model.weights}
    doc = f"model.onnx: opset {model.spec.onnx.opset}, checked in ONNX Runtime"
    return stage(model, build, inputs, ()).task(doc=doc, params=overrides.params("onnx"))


def stage(model: Model, build: Build, inputs: Paths, code: tuple[str, ...]) -> Stage:
    """The stage around a `build` that makes model.onnx. code: besides what all of them need."""
    return Stage(
        name=f"onnx:{model.name}",
        model=model,
        build=build,
        inputs=inputs,
        outputs={
            "model": model.artifact("model.onnx"),
            "signature": model.artifact("model.onnx.signature.json"),
            "export": model.artifact("model.onnx.export.json"),
            "tools": model.artifact("model.onnx.tools.json"),
        },
        images=max(model.spec.max_batch_size, model.spec.onnx.batch_size),
        settings={
            **architecture.settings_of(model),
            **settings(model.spec.onnx),
            "interface": architecture.interface_of(model),
            "shape": model.spec.input.shape,
            "sizes": model.spec.sizes,
            "max_batch_size": model.spec.max_batch_size,
        },
        tools=TOOLS,
        code=(*code_of("onnx", "architecture", "compare"), *code, *architecture.code_of(model)),
    )


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import torch

    script = torch.jit.load(inputs["model"])
    module = architecture.create(settings, inputs["weights"], exportable=True)
    module = architecture.served(module, settings["interface"])
    shape = architecture.input_shape(module, settings["shape"])
    exporters = {"torchscript": script, "dynamo": module}
    if settings["exporter"] == "auto":
        wanted, choice = list(exporters), "first choice"
    else:
        wanted, choice = [settings["exporter"]], "the spec's choice"
    refusals = {}
    for exporter in wanted:
        try:
            with tempfile.TemporaryDirectory(dir=os.path.dirname(outputs["model"])) as folder:
                graph = slimmed(exported(exporter, exporters[exporter], shape, settings, folder))
            save(graph, outputs["model"], settings["external_data"])
            error = check(outputs["model"], script, module, shape, settings)
        except ExporterRefusedError as refusal:
            refusals[exporter] = str(refusal)
            print(f"{exporter} exporter: {refusal}")
            continue
        why = "; ".join(f"since {other} {reason}" for other, reason in refusals.items()) or choice
        describe(graph, outputs, exporter, why)
        return {"exporter": f"{exporter}, {why}", "nodes": len(graph.graph.node), "error": error}
    raise UserError("; ".join(f"the {exporter} exporter {reason}" for exporter, reason in refusals.items()))


def describe(graph: "onnx.ModelProto", outputs: Paths, exporter: str | None, why: str) -> None:
    """What is written beside model.onnx: its signature, how it came about, and by which tools."""
    known = {"opset": opset(graph), "ir_version": graph.ir_version}
    records = {
        "signature": {**tensors(graph), **known},
        "export": {"exporter": exporter, "why": why, **known},
        "tools": versions(TOOLS),
    }
    for name, record in records.items():
        with open(outputs[name], "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)


class ExporterRefusedError(Exception):
    """Why one exporter's result is not used; the message continues "the … exporter"."""


def exported(
    exporter: str, source: "torch.nn.Module", shape: tuple[int, int, int], settings: Settings, folder: str
) -> "onnx.ModelProto":
    """The graph as torch writes it, into an empty folder."""
    import onnx
    import torch

    if settings["opset"] > HIGHEST_OPSET[exporter]:
        raise ExporterRefusedError(f"writes opset {HIGHEST_OPSET[exporter]} at most")
    format = settings["interface"]["format"]
    batch = architecture.example(shape, settings["batch_size"], format)
    opened = architecture.open_dimensions(source, shape, settings["sizes"], format)
    height, width = architecture.height_and_width(format)
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
            batch = architecture.example(shape, max(2, settings["batch_size"]), format)
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


def opset(graph: "onnx.ModelProto") -> int:
    """The version of ONNX's own operators that the graph uses."""
    return int(next(entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")))


def slimmed(graph: "onnx.ModelProto") -> "onnx.ModelProto":
    """Simplified, and without what tells of the machine."""
    import onnxslim

    return without_traces(onnxslim.slim(graph))


def without_traces(graph: "onnx.ModelProto") -> "onnx.ModelProto":
    """Without what tells of the machine: stack traces, source lines, the exporter's notes."""
    graph.doc_string = graph.graph.doc_string = ""
    del graph.metadata_props[:], graph.graph.metadata_props[:]
    nodes = [*graph.graph.node, *(node for function in graph.functions for node in function.node)]
    for part in (*nodes, *graph.graph.value_info, *graph.graph.input, *graph.graph.output, *graph.graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    return graph


def save(graph: "onnx.ModelProto", path: str, external_data: bool) -> None:
    """One file; or a folder with the weights apart, as Triton wants it: model.onnx/model.onnx.

    Source of the folder's form: the server's docs, user_guide/model_repository.md, "ONNX Models".
    """
    import onnx

    files.discard(path)  # of an exporter that was refused
    weights = sum(len(tensor.raw_data) for tensor in graph.graph.initializer)
    if external_data or weights > LARGEST_MESSAGE:
        os.makedirs(path)
        name = os.path.basename(path)
        onnx.save(graph, f"{path}/{name}", save_as_external_data=True, location=f"{name}.data", size_threshold=1024)
    else:
        onnx.save(graph, path)


def check(
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
    others = architecture.open_shapes(shape, settings["sizes"])[1:]
    limit = tolerance("fp32", architecture.sensitivity(module, shape, batches[0]))
    worst = 0.0
    for size, of in (*((size, shape) for size in batches), *((batches[0], other) for other in others)):
        batch = architecture.example(of, size, settings["interface"]["format"], seed=size)
        at = f"batch {size}" + (f" of {of[1]}x{of[2]}" if others else "")
        expected = [answer.numpy() for answer in architecture.forward(script, batch)]
        try:
            found = run(batch.numpy())
        except Exception as error:
            raise ExporterRefusedError(f"wrote a graph that does not run at {at}: {first_lines(error)}") from error
        worst = max(worst, disagreement(continuous(found), continuous(expected)))
        if not worst <= limit:
            other = "the source" if script is module else "model.pt"
            raise ExporterRefusedError(
                f"wrote a graph that differs from {other} by {worst:.1e} at {at} (limit {limit:.0e})"
            )
    return worst


def tensors(graph: "onnx.ModelProto") -> dict[str, list[dict[str, Any]]]:
    """The signature of the graph: name, NumPy's dtype and shape of each input and output; -1 for an open dimension."""

    def tensor(value: "onnx.ValueInfoProto") -> dict[str, Any]:
        shape = [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim]
        return {"name": value.name, "dtype": np_type(value).name, "shape": shape}

    return {"inputs": [tensor(v) for v in graph.graph.input], "outputs": [tensor(v) for v in graph.graph.output]}
