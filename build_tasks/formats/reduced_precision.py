"""ONNX graphs of reduced precision, converted from the fp32 graph by NVIDIA's modelopt.

    model.onnx ─► AutoCast ─────────────────────────► fp16, bf16: casts in the graph
               └► quantize, with calibration samples ─► int8, fp8: Q/DQ pairs, the other nodes in fp16

engine.keep_fp32 and the lock file of `doit repair` name nodes that are excluded. stages/precision.py and
stages/repair.py convert graphs with these functions.
"""

import os
import re
import tempfile
from typing import TYPE_CHECKING

from build_tasks.errors import UserError, first_lines
from build_tasks.formats import declarations
from build_tasks.formats.declarations import INTERFACE_MODULES
from build_tasks.runtime.stage import Paths, Settings
from build_tasks.spec.interface import interface_of
from build_tasks.spec.model import Model
from build_tasks.spec.pictures import picture_tables
from build_tasks.spec.tables import QUANTIZED_PRECISIONS
from build_tasks.tensors import INPUT, Feed, batch_of, resize, take
from build_tasks.verification import accuracy_samples

if TYPE_CHECKING:
    import onnx

# modelopt offers "max" and "entropy". With only a few calibration pictures, "max" gives convolutions a better accuracy.
CALIBRATION_METHOD = "max"
CALIBRATION_SAMPLES = 8  # number of samples assumed when estimating memory; a spec may have more
MAX_SUGGESTIONS = 3


class NothingToQuantizeError(UserError):
    """No node was quantized: all nodes are excluded, or modelopt found none that is worth quantizing."""


def inputs_of(model: Model, precision: str) -> Paths:
    """Return the input files of a conversion, by name."""
    source = calibration_source(model, precision)
    uses_accuracy_samples = precision in QUANTIZED_PRECISIONS and not source
    return {
        "model.onnx": model.artifact("model.onnx"),
        **({"samples": model.artifact("samples.json")} if uses_accuracy_samples else {}),
        **({path: path for path in accuracy_samples.sample_files(source)} if source else {}),
    }


def settings_of(model: Model, precision: str) -> Settings:
    """Return the settings of a conversion, for the fingerprint and for `convert_graph`."""
    engine, source = model.spec.engine, calibration_source(model, precision)
    return {
        "model": model.name,
        "precision": precision,
        "keep_fp32": engine.keep_fp32,
        # Only fp16 graphs can have inputs and outputs in their own precision. A spec with fp16 may set false, and
        # `doit compare` converts its model to the other precisions as well.
        "keep_io_types": engine.keep_io_types or precision != "fp16",
        "external_data": model.spec.onnx.external_data,
        "calibration": source,
        **(declarations.settings_of(model) if source else {}),
        **({"input": declarations.input_settings_of(model)} if source else {}),
        **({"interface": interface_of(model.spec), "pictures": picture_tables(model.spec)} if source else {}),
        **({"picture": not model.spec.inputs} if source else {}),
    }


def tools_of(model: Model, precision: str) -> tuple[str, ...]:
    """Return the distributions that a conversion uses."""
    for_pictures = ("timm", "torchvision", "pillow") if calibration_source(model, precision) else ()
    return ("nvidia-modelopt", "onnx", "onnx-graphsurgeon", "onnxruntime", *for_pictures)


def convert_graph(
    source: "onnx.ModelProto",
    samples: list[Feed] | None,
    settings: Settings,
    excluded: list[str],
    folder: str,
    other_precision: str = "fp16",
) -> "onnx.ModelProto":
    """Return the graph in the precision of the settings. `source` stays as it is.

    Args:
        source: The fp32 graph.
        samples: The samples for calibration. None for fp16 and bf16.
        settings: What `settings_of` returns.
        excluded: Names of further nodes that stay in fp32, or that are not quantized.
        folder: For temporary files.
        other_precision: The precision of the nodes that are not quantized.
    Raises:
        UserError: If modelopt cannot convert the graph.
        NothingToQuantizeError: If no node was quantized.
    """
    from build_tasks.formats.onnx_files import onnx_file, save_onnx, strip_metadata
    from build_tasks.formats.small_weights import restore_signs

    operators, nodes = resolve_keep_fp32(source, settings["keep_fp32"])
    excluded_patterns = [f"{re.escape(name)}$" for name in excluded]
    with tempfile.TemporaryDirectory(dir=folder) as drafts:
        path = f"{drafts}/model.onnx"  # modelopt writes files beside the file that it reads
        save_onnx(source, path, external_data=False)
        path = onnx_file(path)
        if samples is None:
            graph = cast_graph(path, operators, [*nodes, *excluded_patterns], settings)
            restore_signs(graph, source)
            return strip_metadata(graph)
        batches = split_batches(source, samples)
        return strip_metadata(
            quantize_graph(path, operators, nodes, excluded_patterns, batches, settings, other_precision)
        )


def resolve_keep_fp32(graph: "onnx.ModelProto", entries: list[str]) -> tuple[list[str], list[str]]:
    """Return the operator types and the patterns of node names that stay in fp32.

    Args:
        graph: The fp32 graph.
        entries: engine.keep_fp32: operator types, or regular expressions for whole names of nodes.
    Raises:
        UserError: If an entry is no regular expression, or matches nothing.
    """
    import difflib

    types, names = sorted({node.op_type for node in graph.graph.node}), [node.name for node in graph.graph.node]
    operators, patterns = [], []
    for entry in entries:
        if entry in types:
            operators.append(entry)
            continue
        try:
            matches = any(re.fullmatch(entry, name) for name in names)
        except re.error as error:
            raise UserError(f"engine.keep_fp32: {entry!r} is not a regular expression: {error}") from error
        if not matches:
            similar = difflib.get_close_matches(entry, [*types, *names], n=MAX_SUGGESTIONS)
            hint = (
                f"; did you mean {' or '.join(map(repr, similar))}?" if similar else f"; operators: {', '.join(types)}"
            )
            raise UserError(f"engine.keep_fp32: no operator type and no node is called {entry!r}{hint}")
        patterns.append(f"(?:{entry})$")
    return operators, patterns


def cast_graph(path: str, operators: list[str], nodes: list[str], settings: Settings) -> "onnx.ModelProto":
    """Return the graph in fp16 or bf16.

    Weights that fp16 cannot represent stay in fp32, and so do `operators` and `nodes`.

    Args:
        path: The fp32 graph.
        operators: Operator types that stay in fp32.
        nodes: Patterns of node names that stay in fp32.
        settings: What `settings_of` returns.
    Raises:
        UserError: If AutoCast cannot convert the graph.
    """
    import numpy as np
    from modelopt.onnx.autocast import convert_to_mixed_precision

    try:
        graph: onnx.ModelProto = convert_to_mixed_precision(
            path,
            low_precision_type=settings["precision"],
            op_types_to_exclude=operators,
            nodes_to_exclude=nodes,
            keep_io_types=settings["keep_io_types"],
            data_max=np.inf,
            providers=["cpu"],
        )
    except Exception as error:  # from onnx, ONNX Runtime or modelopt, which have no common base class
        problem = f"AutoCast cannot convert the graph to {settings['precision']}: {first_lines(error)}"
        raise UserError(problem + _advice(path)) from error
    # AutoCast writes contradicting shapes for some attention models, and ONNX Runtime then refuses the graph.
    del graph.graph.value_info[:]
    return graph


def _advice(path: str) -> str:
    """Return the end of the message about a graph that AutoCast cannot convert: the operator that it does not know."""
    import onnx

    from build_tasks.formats.onnx_files import foreign_node

    graph = onnx.load(path, load_external_data=False)
    if node := foreign_node(graph):
        return f"; TensorRT does not have {node.op_type}, an operator of {node.domain}: leave the engine out of formats"
    for node in graph.graph.node:
        if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
            return (
                f"; it does not cast what the branches of {node.op_type} {node.name} use: set the precision to "
                '"fp32", or export the network without branches'
            )
    return ""


def quantize_graph(
    path: str,
    operators: list[str],
    nodes: list[str],
    excluded: list[str],
    samples: list[Feed],
    settings: Settings,
    other_precision: str,
) -> "onnx.ModelProto":
    """Return the graph with Q/DQ pairs before the nodes that are quantized.

    Args:
        path: The fp32 graph.
        operators: Operator types that stay in fp32.
        nodes: Patterns of node names that stay in fp32. If this list is not empty, all nodes that are not quantized
            stay in fp32 (modelopt can exclude only operator types from fp16).
        excluded: Patterns of further node names that are not quantized.
        samples: The calibration samples, in batches of a size that the graph accepts.
        settings: What `settings_of` returns.
        other_precision: The precision of the nodes that are not quantized.
    Raises:
        UserError: If modelopt cannot quantize the graph.
        NothingToQuantizeError: If it quantized no node.
    """
    import numpy as np
    import onnx
    from modelopt.onnx.quantization import quantize

    draft = path.removesuffix(".onnx") + ".quantized.onnx"
    try:
        quantize(
            path,
            settings["precision"],
            calibration_data={name: np.concatenate([feed[name] for feed in samples]) for name in samples[0]},
            calibration_method=CALIBRATION_METHOD,
            calibration_eps=["cpu"],
            op_types_to_exclude=operators or None,
            op_types_to_exclude_fp16=operators or None,
            nodes_to_exclude=[*nodes, *excluded],
            high_precision_dtype="fp32" if nodes else other_precision,
            use_external_data_format=os.path.exists(f"{path}.data"),
            output_path=draft,
            log_level="WARNING",
        )
        graph = onnx.load(draft)
    except Exception as error:
        raise UserError(f"the graph cannot be quantized to {settings['precision']}: {first_lines(error)}") from error
    if not any(node.op_type == "QuantizeLinear" for node in graph.graph.node):
        raise NothingToQuantizeError(
            f"modelopt finds no node in the graph that is worth quantizing to {settings['precision']}; "
            'use engine.precision = "fp16"'
        )
    return graph


def split_batches(graph: "onnx.ModelProto", groups: list[Feed]) -> list[Feed]:
    """Return the samples in batches that the graph accepts: one for each group, or batches of its fixed size.

    If the last batch is too small, samples are repeated to fill it.
    """
    fixed = graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    batches = []
    for samples in groups:
        size = fixed or batch_of(samples)
        count = -(-batch_of(samples) // size)
        filled = resize(samples, count * size)
        batches += [take(filled, slice(start, start + size)) for start in range(0, count * size, size)]
    return batches


def calibration_samples(inputs: Paths, settings: Settings) -> list[Feed] | None:
    """Return the calibration samples in groups of one shape, as clients send them. None for fp16 and bf16."""
    from polygraphy.json import load_json

    from build_tasks.formats import input_samples, picture_transform, pytorch_network
    from build_tasks.formats.serving_interface import resolve_interface

    if settings["precision"] not in QUANTIZED_PRECISIONS:
        return None
    if settings["calibration"] is None:
        return [dict(feed) for feed in load_json(inputs["samples"])]
    source, paths = settings["calibration"], [path for name, path in inputs.items() if name == path]
    module = pytorch_network.create_network(settings)
    if not settings["picture"] or (source not in paths and any(path.endswith(".npz") for path in paths)):
        interface = resolve_interface(module, settings["interface"])
        return input_samples.load_samples(module, source, paths, interface, settings["pictures"])[1]
    config, input_format = picture_transform.data_config(module, settings["input"]), settings["input"]["format"]
    _, samples = accuracy_samples.load_samples(
        source,
        paths,
        lambda: picture_transform.transform(config, input_format),
        config,
        input_format,
    )
    return [{INPUT: samples}]


def source_modules(model: Model, precision: str) -> tuple[str, ...]:
    """Return the project's modules that affect the graph, for the fingerprint of the stages that convert it."""
    small_weights = "build_tasks.formats.small_weights"
    modules = (__name__, "build_tasks.formats.onnx_files", small_weights, "build_tasks.tensors")
    if calibration_source(model, precision) is None:
        return modules
    samples = (
        "build_tasks.formats.input_samples",
        *INTERFACE_MODULES,
        "build_tasks.triton.preprocess_model.preprocessing",
        "build_tasks.verification.accuracy_samples",
        "build_tasks.verification.tensor_samples",
    )
    return (*modules, *samples, *declarations.source_modules(model))


def user_source_files(model: Model, precision: str) -> tuple[str, ...]:
    """Return the user's files that define the network. They are needed only to preprocess engine.calibration."""
    return declarations.user_source_files(model) if calibration_source(model, precision) else ()


def calibration_source(model: Model, precision: str) -> str | None:
    """Return engine.calibration. None for fp16 and bf16, and if the accuracy samples are used for calibration."""
    calibration = model.spec.engine.calibration
    return model.source(calibration) if calibration and precision in QUANTIZED_PRECISIONS else None
