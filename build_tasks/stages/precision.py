"""precision: model.onnx -> model.<precision>.onnx, the graph that engines are compiled from, and its signature

    fp16, bf16   AutoCast: everything is cast, but for what engine.keep_fp32 and the lock file name
    int8, fp8    Q/DQ pairs with scales from the calibration samples; what is not quantised is fp16

TensorRT 11 and TensorRT-RTX take a graph's types as they stand, and TensorRT 10 can: one way serves them all.
fp32 and tf32 are compiled from model.onnx itself.

What may be cast is decided by the gate, and by `doit repair` where that fails (repair.py), not by a rule of thumb.
AutoCast's own rule keeps in fp32 whatever exceeds 512 on the samples, whether that costs accuracy or not: a needless
loss of speed in some networks, and no help where small numbers vanish.
"""

import os
from typing import TYPE_CHECKING, Any

from build_tasks.formats.onnx_files import onnx_file, save_onnx, signature_tensors
from build_tasks.formats.reduced_precision import (
    CALIBRATION_SAMPLES,
    LOCK_FILE,
    calibration_samples,
    convert_graph,
    inputs_of,
    locked_nodes,
    settings_of,
    source_modules,
    tools_of,
    user_source_files,
)
from build_tasks.json_files import write_json
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.model import QUANTIZED_PRECISIONS, Model

if TYPE_CHECKING:
    pass


def task(model: Model, precision: str) -> dict[str, Any]:
    file = model.graph_file(precision)
    lock = model.source(LOCK_FILE)
    made_here = model.spec.engine.repair and file == model.graph
    locked = {"lock": lock} if os.path.exists(lock) or made_here else {}
    stage = Stage(
        name=f"precision:{model.graph_name(precision)}",
        model=model,
        build=build,
        inputs={**inputs_of(model, precision), **locked},
        outputs={"model": model.artifact(file), "signature": model.artifact(f"{file}.signature.json")},
        peak_batch=CALIBRATION_SAMPLES if precision in QUANTIZED_PRECISIONS else 1,
        settings=settings_of(model, precision),
        tools=tools_of(model, precision),
        modules=(__name__, *source_modules(model, precision)),
        source_files=user_source_files(model, precision),
    )
    task = stage.task(doc=f"{file}, which engines are compiled from")
    if made_here and lock not in task["file_dep"]:
        task["file_dep"].append(lock)  # by engine.repair it is a target, though not in build/: repair goes first
    return task


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import onnx

    source = onnx.load(onnx_file(inputs["model.onnx"]))
    spared = locked_nodes(inputs["lock"], settings["precision"], source) if "lock" in inputs else []
    graph = convert_graph(
        source, calibration_samples(inputs, settings), settings, spared, os.path.dirname(outputs["model"])
    )
    save_onnx(graph, outputs["model"], settings["external_data"])
    write_json(outputs["signature"], signature_tensors(graph))
    kinds = [node.op_type for node in graph.graph.node]
    added = "QuantizeLinear" if settings["precision"] in QUANTIZED_PRECISIONS else "Cast"
    return {"nodes": len(kinds), added: kinds.count(added), **({"locked": len(spared)} if spared else {})}
