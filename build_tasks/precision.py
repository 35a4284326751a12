"""precision: model.onnx -> model.<precision>.onnx, the graph that engines are compiled from, and its signature

    fp16, bf16   AutoCast: casts around what may lose digits, decided by the values that the accuracy samples produce
    int8, fp8    Q/DQ pairs with scales from the calibration pictures; what is not quantised is fp16

TensorRT 11 and TensorRT-RTX take a graph's types as they stand, and TensorRT 10 can: one way serves them all.
fp32 and tf32 are compiled from model.onnx itself.
"""

import json
import os
import re
import tempfile
from typing import TYPE_CHECKING, Any

from build_tasks import architecture, reference
from build_tasks.compare import INPUT, onnx_file
from build_tasks.errors import UserError, first_lines
from build_tasks.onnx import save, tensors, without_traces
from build_tasks.spec import QUANTISED, Model
from build_tasks.stage import Notes, Paths, Settings, Stage, code_of

if TYPE_CHECKING:
    import numpy as np
    import onnx

# Of the two that modelopt has: with a handful of pictures the extremes serve convolutions better than entropy does.
CALIBRATION_METHOD = "max"


def task(model: Model) -> dict[str, Any]:
    engine = model.spec.engine
    folder = model.source(engine.calibration) if engine.calibration else None
    pictures = reference.images(folder) if folder else []
    stage = Stage(
        name=f"precision:{model.name}",
        model=model,
        build=build,
        inputs={
            "model": model.artifact("model.onnx"),
            "samples": model.artifact("samples.json"),
            **{path: path for path in pictures},
        },
        outputs={"model": model.artifact(model.graph), "signature": model.artifact(f"{model.graph}.signature.json")},
        settings={
            "precision": engine.precision,
            "keep_fp32": engine.keep_fp32,
            "keep_io_types": engine.keep_io_types,
            "external_data": model.spec.onnx.external_data,
            "calibration": folder,
            **(architecture.settings_of(model) if folder else {}),
            **({"input": architecture.input_settings_of(model)} if folder else {}),
        },
        tools=(
            *("nvidia-modelopt", "onnx", "onnx-graphsurgeon", "onnxruntime"),
            *(("timm", "torchvision", "pillow") if folder else ()),
        ),
        code=(
            *code_of("precision", "onnx", "compare"),
            *((*code_of("reference", "architecture"), *architecture.code_of(model)) if folder else ()),
        ),
    )
    return stage.task(doc=f"{model.graph}, which engines are compiled from")


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    import onnx

    source = onnx.load(onnx_file(inputs["model"]))
    operators, nodes = kept(source, settings["keep_fp32"])
    samples = batches(source, calibration(inputs, settings))
    convert = quantised if settings["precision"] in QUANTISED else cast
    with tempfile.TemporaryDirectory(dir=os.path.dirname(outputs["model"])) as folder:
        path = f"{folder}/model.onnx"  # modelopt writes beside what it reads
        save(source, path, external_data=False)
        graph = without_traces(convert(onnx_file(path), operators, nodes, samples, settings))
    save(graph, outputs["model"], settings["external_data"])
    with open(outputs["signature"], "w", encoding="utf-8") as file:
        json.dump(tensors(graph), file, indent=1)
    kinds = [node.op_type for node in graph.graph.node]
    added = "QuantizeLinear" if settings["precision"] in QUANTISED else "Cast"
    return {"nodes": len(kinds), added: kinds.count(added)}


def kept(graph: "onnx.ModelProto", entries: list[str]) -> tuple[list[str], list[str]]:
    """The operator types, and the patterns of node names, that shall stay fp32. UserError for one that fits nothing."""
    import difflib

    types, names = sorted({node.op_type for node in graph.graph.node}), [node.name for node in graph.graph.node]
    operators, patterns = [], []
    for entry in entries:
        if entry in types:
            operators.append(entry)
            continue
        try:
            fits = any(re.fullmatch(entry, name) for name in names)
        except re.error as error:
            raise UserError(f"engine.keep_fp32: {entry!r} is not a regular expression: {error}") from error
        if not fits:
            near = difflib.get_close_matches(entry, [*types, *names], n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; operators: {', '.join(types)}"
            raise UserError(f"engine.keep_fp32: no operator type and no node is called {entry!r}{hint}")
        patterns.append(f"(?:{entry})$")
    return operators, patterns


def cast(
    path: str, operators: list[str], nodes: list[str], samples: "list[np.ndarray]", settings: Settings
) -> "onnx.ModelProto":
    """The graph in fp16 or bf16, but for what is named and for what the samples show to leave fp16's range."""
    from modelopt.onnx.autocast import convert_to_mixed_precision
    from polygraphy.json import save_json

    calibration_data = f"{os.path.dirname(path)}/samples.json"
    save_json([{INPUT: batch} for batch in samples], calibration_data)
    try:
        graph: onnx.ModelProto = convert_to_mixed_precision(
            path,
            low_precision_type=settings["precision"],
            op_types_to_exclude=operators,
            nodes_to_exclude=nodes,
            keep_io_types=settings["keep_io_types"],
            calibration_data=calibration_data,
            providers=["cpu"],
        )
    except Exception as error:  # of onnx, ONNX Runtime or modelopt, which have no common base
        raise UserError(
            f"AutoCast cannot convert the graph to {settings['precision']}: {first_lines(error)}"
        ) from error
    # The shapes that it writes for some attention models contradict each other, and ONNX Runtime refuses the graph.
    del graph.graph.value_info[:]
    return graph


def quantised(
    path: str, operators: list[str], nodes: list[str], samples: "list[np.ndarray]", settings: Settings
) -> "onnx.ModelProto":
    """The graph with Q/DQ pairs; fp16 elsewhere, or fp32 where single nodes shall stay so."""
    import numpy as np
    import onnx
    from modelopt.onnx.quantization import quantize

    draft = path.removesuffix(".onnx") + ".quantised.onnx"
    try:
        quantize(
            path,
            settings["precision"],
            calibration_data={INPUT: np.concatenate(samples)},
            calibration_method=CALIBRATION_METHOD,
            calibration_eps=["cpu"],
            op_types_to_exclude=operators or None,
            op_types_to_exclude_fp16=operators or None,
            nodes_to_exclude=nodes,
            high_precision_dtype="fp32" if nodes else "fp16",  # fp16 can be refused to operator types only
            use_external_data_format=os.path.exists(f"{path}.data"),
            output_path=draft,
            log_level="WARNING",
        )
        graph = onnx.load(draft)
    except Exception as error:
        raise UserError(f"the graph cannot be quantised to {settings['precision']}: {first_lines(error)}") from error
    if not any(node.op_type == "QuantizeLinear" for node in graph.graph.node):
        raise UserError(
            f"modelopt finds nothing in the graph that is worth quantising to {settings['precision']}: "
            "engine.precision fp16 is what it would be"
        )
    return graph


def batches(graph: "onnx.ModelProto", samples: "np.ndarray") -> "list[np.ndarray]":
    """The samples in batches that the graph takes: all at once, or of its fixed size, the last filled with repeats."""
    import numpy as np

    (tensor,) = graph.graph.input
    size = tensor.type.tensor_type.shape.dim[0].dim_value or len(samples)
    count = -(-len(samples) // size)
    return np.split(np.resize(samples, (count * size, *samples.shape[1:])), count)


def calibration(inputs: Paths, settings: Settings) -> "np.ndarray":
    """The pictures whose activations set the scales: float32 (pictures, channels, height, width)."""
    from polygraphy.json import load_json

    if settings["calibration"] is None:
        samples: np.ndarray = load_json(inputs["samples"])[0][INPUT]
        return samples
    pictures = [path for name, path in inputs.items() if name == path]
    if not pictures:
        raise UserError(f"{settings['calibration']}: no pictures here ({', '.join(reference.SUFFIXES)})")
    module = architecture.create(settings)
    return reference.preprocessed(pictures, architecture.transform(module, settings["input"])).numpy()
