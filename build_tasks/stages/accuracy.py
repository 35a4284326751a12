"""accuracy: the gate result of an artifact -> model.*.verdict.json, which engine and publish require

model.*.measured.json ─► limits by precision, sensitivity, spec ─► ok | not testable ─► model.*.verdict.json
                                                                 └► refused: the task fails
                                                                      └► a graph of reduced precision:
                                                                         the error after each node, in the log
"""

from typing import Any

from build_tasks.errors import UserError
from build_tasks.formats import layer_errors
from build_tasks.formats.declarations import LAYER_MODULES
from build_tasks.json_files import read_json, write_json
from build_tasks.runtime import worker
from build_tasks.runtime.digests import digest
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage, log_of
from build_tasks.spec.model import Model
from build_tasks.spec.tables import NATIVE_PRECISIONS, QUANTIZED_PRECISIONS
from build_tasks.tensors import SHARED_SCALE
from build_tasks.verification import gate, judged_artifacts, metrics


def task(model: Model, model_format: str, file: str) -> dict[str, Any]:
    """The doit task of an artifact that Triton serves."""
    precision = model.precision(model_format)
    stage = _stage(model, model.artifact_task_name(model_format, file), model_format, file, precision)
    return stage.task(doc=f"{file} against the gate of {precision}; only a file that passes is published")


def task_of_graph(model: Model) -> dict[str, Any]:
    """The doit task of the graph that engines are compiled from, if Triton does not serve it."""
    name = model.graph_name(model.spec.engine.precision)
    precision = model.spec.engine.precision if model.converted else model.precision("onnx")
    stage = _stage(model, name, "graph", model.graph, precision)
    return stage.task(doc=f"{model.graph} against the gate of {precision}; only a graph that passes is compiled")


def _stage(model: Model, name: str, model_format: str, file: str, precision: str) -> Stage:
    reduced = model_format in ("graph", "onnx") and precision not in NATIVE_PRECISIONS
    source = {"torchscript": file, "onnx": file, "graph": "model.onnx"}.get(model_format)  # what an export made
    return Stage(
        name=f"accuracy:{name}",
        model=model,
        build=build,
        inputs={
            "measured": model.artifact(f"{file}.measured.json"),
            "reference": model.artifact("reference.json"),
            "model": model.artifact(file),
            **({"signature": model.artifact(f"{source}.signature.json")} if source else {}),
            **(layer_errors.inputs_of(model, precision) if reduced else {}),
        },
        outputs={"verdict": model.artifact(f"{file}.verdict.json")},
        settings={
            **gate.settings_of(model, model_format, precision),
            "model": model.name,
            "log": log_of(model, f"accuracy:{name}"),
        },
        tools=(),
        modules=(
            __name__,
            "build_tasks.verification.judged_artifacts",
            *gate.GATE_MODULES,
            *(LAYER_MODULES if reduced else ()),
        ),
        in_process=True,
    )


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    measured: metrics.MeasuredFile = read_json(inputs["measured"])
    for name, recorded in (("model", measured["model"]), ("reference", measured["reference"])):
        if recorded != digest(inputs[name]):  # `doit -s` skips the measure task
            raise UserError(f"{inputs['measured']} was measured with another file than {inputs[name]}")
    signature = read_json(inputs["signature"]) if "signature" in inputs else {}
    constants = signature.get("traced_away") if any(gate.failures(measured["outputs"], settings)) else None
    operator = signature.get("shared_scale")
    cause = f"; {SHARED_SCALE.format(operator)}" if operator else ""
    if error := gate.gate_error(measured, settings, "" if constants else cause + advice(settings)):
        if constants:
            raise UserError(f"{constants}; {error}")
        inaccurate = "graph" in inputs and any(gate.failures(measured["outputs"], settings))
        raise UserError(error + (layers_message(inputs, settings) if inaccurate else ""), limit=None)
    status = gate.status(measured, settings)
    verdict: gate.GateResult = {"model": measured["model"], "signature": measured["signature"], "status": status}
    write_json(outputs["verdict"], verdict)
    largest, limit = gate.nearest_limit(measured, settings)
    top1 = judged_artifacts.format_top1(measured, settings)
    return {"accuracy": status, "error": f"{largest}, limit {limit}", **({"top-1": top1} if top1 else {})}


def advice(settings: Settings) -> str:
    """The end of the message about a refused artifact: the remedies that the user can try."""
    precision, model_format, model = settings["precision"], settings["format"], settings["model"]
    by_format = precision == "fp32" or model_format in ("torchscript", "onnx", "aoti")
    key = f'format = "{model_format}"' if by_format else f'precision = "{precision}"'
    rule = f"an [[accuracy.gate]] with {key}"
    if precision != "fp32" and model_format in ("torchscript", "aoti"):
        itself = " (fp32 serves model.pt itself)" if model_format == "torchscript" else ""
        return f"; try another {model_format}.precision{itself}, or {rule}"
    if precision != "fp32" and model_format == "onnx":
        return f"; try another onnx.precision (fp32 serves model.onnx itself), nodes in engine.keep_fp32, or {rule}"
    if precision in NATIVE_PRECISIONS or model_format == "tensorrt":
        return f"; if that is accurate enough for you, allow it by {rule}"
    calibrate = "more images in engine.calibration, " if precision in QUANTIZED_PRECISIONS else ""
    return (
        f"; `doit repair:{model}` finds the nodes to exclude from {precision}; or try {calibrate}"
        f"another engine.precision, or {rule}"
    )


def layers_message(inputs: Paths, settings: Settings) -> str:
    """The part of the message that says where the error of a refused graph begins.

    The gate runs in doit's process, but the comparison of layers runs ONNX Runtime in a child process. Its log has the
    errors after all nodes.
    """
    try:
        first = worker.call(print_layers, inputs, settings["precision"], log=settings["log"])
    except (worker.CrashError, UserError):  # the graph is refused anyway, and the message has the gate's reason
        return ""
    details = f"layer by layer: {settings['log']}, or `doit layers:{settings['model']}`"
    return f"; {first}; {details}" if first else f"; {details}"


def print_layers(inputs: Paths, precision: str) -> str | None:
    """Print the errors after the nodes of a graph, and return where the error begins."""
    report = layer_errors.compare_layers(inputs["model.onnx"], inputs["graph"], inputs["samples"], precision)
    print(layer_errors.layers_table(report["layers"]).format())
    return layer_errors.first_jump(report)
