"""onnx: model.pt -> model.onnx, model.onnx.signature.json, model.onnx.export.json (which exporter, and why)

    model.pt ──► TorchScript exporter ──► slim ──► check ──► model.onnx
                     │ it or its check fails                 ▲
    network  ──► dynamo exporter ──► slim ──► check ─────────┘

If the source is an ONNX file, nothing is exported:

    weights.onnx ──► batch and size of the spec ──► slim ──► check ──► model.onnx
"""

import os
import tempfile
from typing import Any

from build_tasks.errors import UserError
from build_tasks.formats import pytorch_network
from build_tasks.formats.onnx_export import (
    EXPORT_MODULES,
    TOOLS,
    ExporterRefusedError,
    check_export,
    export,
    slim,
    write_records,
)
from build_tasks.formats.onnx_files import fixed_batch, onnx_file, opset, save_onnx
from build_tasks.formats.onnx_import import IMPORT_MODULES, set_batch_and_size
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec import overrides
from build_tasks.spec.model import Model, table_settings


def task(model: Model) -> dict[str, Any]:
    how = "the source" if model.spec.from_onnx else f"opset {model.spec.onnx.opset}"
    return stage(model).task(doc=f"model.onnx: {how}, checked in ONNX Runtime", params=overrides.params("onnx"))


def stage(model: Model) -> Stage:
    """The stage that makes model.onnx. `doit new` runs it without doit."""
    from_onnx = model.spec.from_onnx
    return Stage(
        name=f"onnx:{model.name}",
        model=model,
        build=build_from_onnx if from_onnx else build,
        inputs={"weights": model.weights}
        if from_onnx
        else {"model": model.artifact("model.pt"), "weights": model.weights},
        outputs={
            "model": model.artifact("model.onnx"),
            "signature": model.artifact("model.onnx.signature.json"),
            "export": model.artifact("model.onnx.export.json"),
            "tools": model.artifact("model.onnx.tools.json"),
        },
        peak_batch=max(model.spec.max_batch_size, model.spec.onnx.batch_size),
        settings={
            **pytorch_network.settings_of(model),
            **table_settings(model.spec.onnx),
            "interface": pytorch_network.interface_of(model),
            "shape": model.spec.input.shape,
            "sizes": model.spec.sizes,
            "max_batch_size": model.spec.max_batch_size,
        },
        tools=TOOLS,
        modules=(
            __name__,
            *EXPORT_MODULES,
            *(IMPORT_MODULES if from_onnx else ()),
        ),
        source_files=pytorch_network.user_source_files(model),
    )


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import torch

    script = torch.jit.load(inputs["model"])
    module = pytorch_network.create_network(settings, inputs["weights"], exportable=True)
    module = pytorch_network.wrap_for_serving(module, settings["interface"])
    shape = pytorch_network.input_shape(module, settings["shape"])
    exporters = {"torchscript": script, "dynamo": module}
    if settings["exporter"] == "auto":
        names, choice = list(exporters), "first choice"
    else:
        names, choice = [settings["exporter"]], "the spec's choice"
    reasons = {}
    for exporter in names:
        try:
            with tempfile.TemporaryDirectory(dir=os.path.dirname(outputs["model"])) as folder:
                graph = slim(export(exporter, exporters[exporter], shape, settings, folder))
            save_onnx(graph, outputs["model"], settings["external_data"])
            difference = check_export(outputs["model"], script, module, shape, settings)
        except ExporterRefusedError as error:
            reasons[exporter] = str(error)
            print(f"{exporter} exporter: {error}")
            continue
        why = "; ".join(f"because {other} {reason}" for other, reason in reasons.items()) or choice
        write_records(graph, outputs, exporter, why)
        return {"exporter": f"{exporter}, {why}", "nodes": len(graph.graph.node), "error": difference}
    raise UserError("; ".join(f"the {name} exporter {reason}" for name, reason in reasons.items()))


def build_from_onnx(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import onnx

    network = pytorch_network.create_network(settings, inputs["weights"])
    channels, height, width = settings["shape"]
    graph = slim(set_batch_and_size(onnx.load(onnx_file(inputs["weights"])), network, settings))
    save_onnx(graph, outputs["model"], settings["external_data"])
    try:
        difference = check_export(outputs["model"], network, network, (channels, height, width), settings)
    except ExporterRefusedError as error:
        problem = str(error).removeprefix("wrote a graph that ")
        batch = "an open batch" if settings["dynamic_axes"] else f"a batch of {settings['batch_size']}"
        own = fixed_batch(inputs["weights"])
        advice = f"; its own is {own}: onnx.dynamic_axes = false and onnx.batch_size = {own} keep it" if own else ""
        raise UserError(f"with {batch} the graph {problem}{advice}") from error
    write_records(graph, outputs, None, "the source is ONNX")
    return {"nodes": len(graph.graph.node), "opset": opset(graph), "error": difference}
