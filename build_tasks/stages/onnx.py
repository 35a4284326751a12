"""onnx: model.pt -> model.onnx, model.onnx.signature.json, model.onnx.export.json (which exporter, and why)

    model.pt ──► TorchScript exporter ──► clean-up, checked ──► model.onnx
                     │ it fails, or its answers differ            ▲
    network  ──► dynamo exporter ──► clean-up, checked ───────────┘

If TorchScript is not served, there is no model.pt. This stage then traces the network itself, and what cannot be traced
is exported by the dynamo exporter.

If the source is an ONNX file, nothing is exported:

    weights.onnx ──► dimensions of the spec ──► clean-up, checked ──► model.onnx
"""

import functools
import os
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from build_tasks.errors import MAX_LINE, UserError
from build_tasks.formats import declarations
from build_tasks.formats.declarations import (
    EXPORT_MODULES,
    EXPORT_TOOLS,
    IMPORT_MODULES,
    PHOTOGRAPHS,
    PROGRAM_MODULES,
    TRACE_MODULES,
)
from build_tasks.json_files import read_json
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec import overrides
from build_tasks.spec.interface import interface_of
from build_tasks.spec.model import Model, table_settings
from build_tasks.spec.ragged import ragged_settings
from build_tasks.tensors import SHARED_SCALE, Interface

if TYPE_CHECKING:
    import onnx
    import torch

    from build_tasks.formats.fp32_comparison import Comparison


def task(model: Model) -> dict[str, Any]:
    how = "the source" if model.spec.from_onnx else f"opset {model.spec.onnx.opset}"
    return stage(model).task(doc=f"model.onnx: {how}, checked in ONNX Runtime", params=overrides.params("onnx"))


def stage(model: Model) -> Stage:
    """The stage that makes model.onnx. `doit new` runs it without doit."""
    from_onnx = model.spec.from_onnx
    trace: Paths = {}
    if "torchscript" in model.spec.formats and not from_onnx:
        trace = {"model": model.artifact("model.pt"), "trace_signature": model.artifact("model.pt.signature.json")}
    return Stage(
        name=f"onnx:{model.name}",
        model=model,
        build=build_from_onnx if from_onnx else build,
        inputs={**trace, "weights": model.weights, **{path: path for path in PHOTOGRAPHS}},
        outputs={
            "model": model.artifact("model.onnx"),
            "signature": model.artifact("model.onnx.signature.json"),
            "export": model.artifact("model.onnx.export.json"),
            "tools": model.artifact("model.onnx.tools.json"),
        },
        # PyTorch and ONNX Runtime compute it, and each keeps the memory of its tensors.
        peak_batch=2 * max(model.spec.max_batch_size, model.spec.onnx.batch_size),
        settings={
            **declarations.settings_of(model),
            **{key: value for key, value in table_settings(model.spec.onnx).items() if key != "precision"},
            "interface": interface_of(model.spec),
            "max_batch_size": model.spec.max_batch_size,
            **({"ragged": ragged_settings(model)} if from_onnx else {"max_opset": model.newest_opset}),
        },
        tools=EXPORT_TOOLS,
        modules=(
            __name__,
            *EXPORT_MODULES,
            *TRACE_MODULES,
            *(IMPORT_MODULES if from_onnx else PROGRAM_MODULES if model.spec.program_suffix else ()),
        ),
        source_files=declarations.user_source_files(model),
    )


class Export(Struct, frozen=True):
    """A graph whose answers are right."""

    exporter: str
    graph: "onnx.ModelProto"
    error: float  # relative, against its source
    clean_up: str


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import torch

    from build_tasks.formats import pytorch_network
    from build_tasks.formats.example_inputs import example_inputs
    from build_tasks.formats.fp32_comparison import Comparison
    from build_tasks.formats.onnx_export import write_records
    from build_tasks.formats.onnx_files import opset, save_onnx
    from build_tasks.formats.pytorch_network import half_precision
    from build_tasks.formats.serving_interface import (
        explain_errors,
        forward,
        output_names,
        resolve_interface,
        wrap_for_serving,
    )
    from build_tasks.formats.torchscript_trace import TRACED_AWAY, traced_away_note

    module = pytorch_network.create_network(settings, inputs["weights"], exportable=True)
    interface = resolve_interface(module, settings["interface"])
    module = wrap_for_serving(module, interface)
    example = example_inputs(interface, 1)
    with explain_errors(example):
        forward(module, example)
    outputs_of_network = output_names(module)
    names, choice = [settings["exporter"]], "the spec's choice"
    if settings["exporter"] == "auto":
        names, choice = ["torchscript", "dynamo"], "first choice"
        if inputs["weights"].endswith(".pt2"):  # what torch.export has written, which the dynamo exporter begins with
            names.reverse()
    constants = ""  # the lines whose decisions the trace leaves out
    with tempfile.TemporaryDirectory(dir=os.path.dirname(outputs["model"])) as folder:

        @functools.cache
        def source(exporter: str) -> torch.nn.Module:
            nonlocal constants
            if exporter == "dynamo":
                return module
            if "model" in inputs:
                path = inputs["model"]
                constants = read_json(inputs["trace_signature"]).get("traced_away", "").removesuffix(f" {TRACED_AWAY}")
            else:
                path, constants = _trace(inputs, interface, settings, folder)
            trace: torch.nn.Module = torch.jit.load(path)
            return trace

        check = functools.partial(_save_and_check, outputs["model"], Comparison(module, interface), interface, settings)
        refusals: dict[str, str] = {}
        write = functools.partial(_first_right_graph, names, source, outputs_of_network, interface)
        found = write(settings, folder, check, refusals)
        if found is None:
            text = "; ".join(f"the {name} exporter {reason}" for name, reason in refusals.items())
            if narrow := half_precision(module):
                text = (
                    f"the network computes in {narrow}, and ONNX is checked in float32: serve TorchScript alone "
                    '(formats = ["torchscript"]), or save the network in float32, since engine.precision sets what is '
                    f"served; {text}"
                )
            if settings["opset"] != "auto":
                automatic = {**settings, "opset": "auto"}
                found = write(automatic, folder, check, {})
                text += f"; onnx.opset = {opset(found.graph)} would do" if found else ""
            # Each part tells something else, so that the middle must not be left out.
            raise UserError(f"{constants} {TRACED_AWAY}; {text}" if constants else text, limit=2 * MAX_LINE)
    save_onnx(found.graph, outputs["model"], settings["external_data"])
    why = "; ".join(f"because {other} {reason}" for other, reason in refusals.items()) or choice
    constants = constants if found.exporter == "torchscript" else ""
    write_records(found.graph, outputs, found.exporter, why, found.clean_up, constants)
    notes = {**_notes(found.graph, found.clean_up), **traced_away_note(constants)}
    return {"exporter": f"{found.exporter}, {why}", "opset": opset(found.graph), **notes, "error": found.error}


def _trace(inputs: Paths, interface: Interface, settings: Settings, folder: str) -> tuple[str, str]:
    """Trace the network as the stage `torchscript` does, and return the path of the file and what it leaves out."""
    from build_tasks.formats import pytorch_network
    from build_tasks.formats.onnx_clean_up import GraphRefusedError
    from build_tasks.formats.torchscript_trace import save_trace

    path = f"{folder}/model.pt"
    module = pytorch_network.create_network(settings, inputs["weights"], exportable=True)
    try:
        return path, save_trace(module, interface, path)
    except UserError as error:
        raise GraphRefusedError(f"has no trace: {error}") from error


def _first_right_graph(
    names: list[str],
    source: "Callable[[str], torch.nn.Module]",
    outputs: list[str],
    interface: Interface,
    settings: Settings,
    folder: str,
    check: "Callable[[onnx.ModelProto], float]",
    refusals: dict[str, str],
) -> Export | None:
    """Return the graph of the first exporter that writes a right one. The reasons of the others go into `refusals`."""
    from build_tasks.formats.onnx_clean_up import GraphRefusedError, clean_up
    from build_tasks.formats.onnx_export import export

    for name in names:
        try:
            graph = export(name, source(name), outputs, interface, settings, folder)
            return Export(name, *clean_up(graph, check))
        except GraphRefusedError as error:
            refusals[name] = str(error)
            print(f"{name} exporter: {error}")
    return None


def build_from_onnx(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import onnx

    from build_tasks.formats import pytorch_network
    from build_tasks.formats.fp32_comparison import Comparison
    from build_tasks.formats.onnx_clean_up import GraphRefusedError, clean_up
    from build_tasks.formats.onnx_export import write_records
    from build_tasks.formats.onnx_files import fixed_batch, onnx_file, opset, save_onnx, shared_scale
    from build_tasks.formats.onnx_import import declare_dims
    from build_tasks.formats.serving_interface import wrap_for_serving

    interface = settings["interface"]
    network = wrap_for_serving(pytorch_network.create_network(settings, inputs["weights"]), interface)
    graph = declare_dims(onnx.load(onnx_file(inputs["weights"])), network, interface, settings)
    check = functools.partial(_save_and_check, outputs["model"], Comparison(network, interface), interface, settings)
    try:
        graph, error_of_graph, how = clean_up(graph, check)
    except GraphRefusedError as error:
        problem = str(error).removeprefix("wrote a graph that ")
        batch = "an open batch" if settings["dynamic_axes"] else f"a batch of {settings['batch_size']}"
        own = fixed_batch(inputs["weights"])
        advice = f"; its own is {own}: onnx.dynamic_axes = false and onnx.batch_size = {own} keep it" if own else ""
        if not own and settings["dynamic_axes"] and (operator := shared_scale(graph)):
            advice = f"; {SHARED_SCALE.format(operator)}"
        raise UserError(f"with {batch} the graph {problem}{advice}") from error
    save_onnx(graph, outputs["model"], settings["external_data"])
    if settings["ragged"]:
        _check_ragged(outputs["model"], interface, settings["ragged"])
    write_records(graph, outputs, None, "the source is ONNX", how)
    return {"opset": opset(graph), **_notes(graph, how), "error": error_of_graph}


def _save_and_check(
    path: str, comparison: "Comparison", interface: Interface, settings: Settings, graph: "onnx.ModelProto"
) -> float:
    from build_tasks.formats.onnx_export import check_export
    from build_tasks.formats.onnx_files import save_onnx
    from build_tasks.formats.ragged_batches import describe

    describe(graph, settings.get("ragged"))
    save_onnx(graph, path, settings["external_data"])
    return check_export(graph, path, comparison, interface, settings)


def _check_ragged(path: str, interface: Interface, ragged: dict[str, Any]) -> None:
    """Check that requests of several lengths form one batch."""
    import numpy as np
    import onnxruntime

    from build_tasks.formats.example_inputs import example_inputs, lengths_to_check
    from build_tasks.formats.onnx_files import onnx_file
    from build_tasks.formats.ragged_batches import check_lengths

    session = onnxruntime.InferenceSession(onnx_file(path), providers=["CPUExecutionProvider"])
    names = [each["name"] for each in interface["inputs"]]
    requests = []
    for seed, lengths in enumerate(lengths_to_check(interface["dimensions"])):
        values = example_inputs(interface, 1, lengths, 100 * seed)
        requests.append(dict(zip(names, map(np.asarray, values), strict=True)))
    check_lengths(session, ragged, requests)


def _notes(graph: "onnx.ModelProto", clean_up: str) -> Notes:
    from build_tasks.formats.onnx_clean_up import USUAL

    return {"nodes": len(graph.graph.node), **({} if clean_up == USUAL else {"clean-up": clean_up})}
