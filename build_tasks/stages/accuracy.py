"""accuracy: what was measured against the gate -> model.*.verdict.json, which compiling and publishing ask for

model.*.measured.json ─► limits by precision, sensitivity, spec ─► ok | not testable | refused
                                                                     │ a graph of reduced precision
                                                                     └► where it goes wrong, layer by layer
"""

from typing import Any

from build_tasks.errors import UserError
from build_tasks.formats import layer_errors
from build_tasks.json_files import read_json, write_json
from build_tasks.runtime import worker
from build_tasks.runtime.digests import digest
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage, log_of
from build_tasks.spec.model import NATIVE_PRECISIONS, QUANTIZED_PRECISIONS, Model
from build_tasks.verification import gate


def task(model: Model, model_format: str, file: str) -> dict[str, Any]:
    """Of an artifact that is served."""
    precision = model.precision(model_format)
    stage = _stage(model, model.artifact_task_name(model_format, file), model_format, file, precision)
    return stage.task(doc=f"{file} against the gate of {precision}; what fails is not published")


def task_of_graph(model: Model) -> dict[str, Any]:
    """Of the graph that engines are compiled from, where it is no artifact that is served."""
    name = model.graph_name(model.spec.engine.precision)
    precision = model.spec.engine.precision if model.converted else model.precision("onnx")
    stage = _stage(model, name, "graph", model.graph, precision)
    return stage.task(doc=f"{model.graph} against the gate of {precision}; what fails is not compiled")


def _stage(model: Model, name: str, model_format: str, file: str, precision: str) -> Stage:
    reduced = model_format == "graph" and precision not in NATIVE_PRECISIONS
    return Stage(
        name=f"accuracy:{name}",
        model=model,
        build=build,
        inputs={
            "measured": model.artifact(f"{file}.measured.json"),
            "reference": model.artifact("reference.json"),
            "model": model.artifact(file),
            **(layer_errors.inputs_of(model, precision) if reduced else {}),
        },
        outputs={"verdict": model.artifact(f"{file}.verdict.json")},
        settings={
            **gate.settings_of(model, model_format, precision),
            "model": model.name,
            "log": log_of(model, f"accuracy:{name}"),
        },
        tools=(),
        modules=(__name__, *gate.GATE_MODULES, *(layer_errors.LAYER_MODULES if reduced else ())),
        in_process=True,
    )


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    measured = read_json(inputs["measured"])
    for name in ("model", "reference"):
        if measured[name] != digest(inputs[name]):  # `doit -s` leaves out the task that measures
            raise UserError(f"{inputs['measured']} is of another file than {inputs[name]}")
    if reason := gate.gate_error(measured, settings, advice(settings)):
        wrong = "graph" in inputs and any(gate.failures(measured["outputs"], settings))
        raise UserError(reason + (where(inputs, settings) if wrong else ""))
    doubt = gate.untestable_reason(measured, settings)
    status = f"not testable: {doubt}" if doubt else "ok"
    verdict = {"model": measured["model"], "signature": measured["signature"], "status": status}
    write_json(outputs["verdict"], verdict)
    error, limit = gate.nearest_limit(measured, settings)
    return {"accuracy": status, "error": f"{error}, limit {limit}"}


def advice(settings: Settings) -> str:
    """What to try, by what is refused."""
    precision, model_format, model = settings["precision"], settings["format"], settings["model"]
    of_format = precision == "fp32" or model_format == "torchscript"
    which = f'format = "{model_format}"' if of_format else f'precision = "{precision}"'
    rule = f"an [[accuracy.gate]] with {which}"
    if precision != "fp32" and model_format == "torchscript":
        return f"; try another torchscript.precision (fp32 serves model.pt itself), or {rule}"
    if precision in NATIVE_PRECISIONS or model_format == "tensorrt":
        return f"; if that is accurate enough for you, say so in {rule}"
    calibrate = "more pictures in engine.calibration, " if precision in QUANTIZED_PRECISIONS else ""
    return (
        f"; `doit repair:{model}` finds the nodes to leave out of {precision}; or try {calibrate}"
        f"another engine.precision, or {rule}"
    )


def where(inputs: Paths, settings: Settings) -> str:
    """Where a refused graph goes wrong, for the message; the whole list goes to the log.

    To judge takes no process of its own, but this does.
    """
    try:
        first = worker.call(opened, inputs, settings["precision"], log=settings["log"])
    except (worker.CrashError, UserError):  # whatever it is, the graph is refused all the same
        return ""
    shown = f"layer by layer: {settings['log']}, or `doit layers:{settings['model']}`"
    return f"; {first}; {shown}" if first else f"; {shown}"


def opened(inputs: Paths, precision: str) -> str | None:
    """Where the error of a graph begins; the errors after its nodes are printed."""
    report = layer_errors.compare_layers(inputs["model.onnx"], inputs["graph"], inputs["samples"], precision)
    print(layer_errors.format_layers(report["layers"]))
    return layer_errors.first_jump(report)
