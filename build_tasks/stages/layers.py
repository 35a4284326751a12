"""layers: the error after each node of a graph of reduced precision -> model.<precision>.onnx.layers.json

    model.onnx ──────────────┐
    model.<precision>.onnx ──┴► ONNX Runtime, every tensor an output ─► the error after each node, largest first

It runs on demand (`doit layers:NAME`). The accuracy stage computes the same errors for a graph that it refuses.
"""

from typing import Any

from build_tasks.formats.declarations import LAYER_MODULES
from build_tasks.formats.layer_errors import compare_layers, first_jump, inputs_of, layers_table
from build_tasks.json_files import write_json
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec import overrides
from build_tasks.spec.model import Model


def task(model: Model) -> dict[str, Any]:
    precision = model.spec.engine.precision
    stage = Stage(
        name=f"layers:{model.name}",
        model=model,
        build=build,
        inputs=inputs_of(model, precision),
        outputs={"layers": model.artifact(f"{model.graph}.layers.json")},
        peak_batch=4 * model.spec.onnx.batch_size,  # all tensors of a graph are in memory at once
        settings={"precision": precision},
        tools=("onnx", "onnx-graphsurgeon", "onnxruntime"),
        modules=(__name__, *LAYER_MODULES),
    )
    return stage.task(doc=f"The error after each node of {model.graph}", params=overrides.params("layers"))


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    report = compare_layers(inputs["model.onnx"], inputs["graph"], inputs["samples"], settings["precision"])
    write_json(outputs["layers"], report)
    return {
        "nodes": f"{len(report['layers'])} compared, {report['not_compared']} not",
        "first": first_jump(report) or "no jump",
        "table": layers_table(report["layers"]),
    }
