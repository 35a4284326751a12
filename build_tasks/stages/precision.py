"""precision: model.onnx -> model.<precision>.onnx, the graph that engines are compiled from or that Triton serves

    fp16, bf16   AutoCast casts all nodes, except the nodes in engine.keep_fp32 and in the lock file
    int8, fp8    Q/DQ pairs with scales from the calibration samples; nodes that are not quantized are cast to fp16

TensorRT 11 and TensorRT-RTX compile a graph in the types that it has, and TensorRT 10 can do so, too. Therefore the
precision is set in the graph, in one way for all of them. Engines of fp32 and tf32 are compiled from model.onnx.

If the gate fails, `doit repair` finds the nodes that must be excluded from the precision (see repair.py).
AutoCast's own rule is not used. It keeps every node in fp32 whose values exceed 512 on the samples, even if this does
not improve the accuracy. Some networks become slower without need, and the rule does not help if small numbers become
zero.
"""

import os
from typing import Any

from build_tasks.formats.lock_file import LOCK_FILE, locked_nodes
from build_tasks.formats.reduced_precision import (
    CALIBRATION_SAMPLES,
    calibration_samples,
    convert_graph,
    inputs_of,
    settings_of,
    source_modules,
    tools_of,
    user_source_files,
)
from build_tasks.json_files import read_json, write_json
from build_tasks.runtime.distributions import versions
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.model import Model
from build_tasks.spec.tables import QUANTIZED_PRECISIONS

CONVERTERS = ("nvidia-modelopt", "onnx", "onnx-graphsurgeon", "onnxruntime")


def task(model: Model, precision: str) -> dict[str, Any]:
    file = model.graph_file(precision)
    lock = model.source(LOCK_FILE)
    repaired = model.spec.engine.repair and file == model.graph  # then the lock file is a target of the repair stage
    locks = {"lock": lock} if os.path.exists(lock) or repaired else {}
    stage = Stage(
        name=f"precision:{model.graph_name(precision)}",
        model=model,
        build=build,
        inputs={
            **inputs_of(model, precision),
            **locks,
            "signature": model.artifact("model.onnx.signature.json"),
            "tools": model.artifact("model.onnx.tools.json"),
        },
        outputs={
            "model": model.artifact(file),
            "signature": model.artifact(f"{file}.signature.json"),
            "tools": model.artifact(f"{file}.tools.json"),
        },
        peak_batch=CALIBRATION_SAMPLES if precision in QUANTIZED_PRECISIONS else 1,
        settings=settings_of(model, precision),
        tools=tools_of(model, precision),
        modules=(__name__, "build_tasks.formats.lock_file", *source_modules(model, precision)),
        source_files=user_source_files(model, precision),
    )
    task = stage.task(doc=f"{file}, which engines are compiled from or Triton serves")
    if repaired and lock not in task["file_dep"]:
        task["file_dep"].append(lock)  # Stage.task leaves it out while it does not exist; doit must run repair first
    return task


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import onnx

    from build_tasks.formats.onnx_files import onnx_file, opset, save_onnx, signature_tensors

    source = onnx.load(onnx_file(inputs["model.onnx"]))
    excluded = locked_nodes(inputs["lock"], settings["precision"], source) if "lock" in inputs else []
    graph = convert_graph(
        source, calibration_samples(inputs, settings), settings, excluded, os.path.dirname(outputs["model"])
    )
    save_onnx(graph, outputs["model"], settings["external_data"])
    write_json(
        outputs["signature"],
        {
            **read_json(inputs["signature"]),  # with the branches that a trace leaves out
            **signature_tensors(graph),
            "opset": opset(graph),
            "ir_version": graph.ir_version,
        },
    )
    write_json(outputs["tools"], {**read_json(inputs["tools"]), **versions(CONVERTERS)})
    operators = [node.op_type for node in graph.graph.node]
    added = "QuantizeLinear" if settings["precision"] in QUANTIZED_PRECISIONS else "Cast"
    return {
        "nodes": len(operators),
        added: operators.count(added),
        **({"locked": len(excluded)} if excluded else {}),
    }
