"""Graphs of reduced precision: cast or quantized from the fp32 graph."""

import os
import re
import tempfile
import tomllib
from typing import TYPE_CHECKING

from msgspec import Struct, ValidationError, convert

from build_tasks.errors import UserError, first_lines
from build_tasks.formats import pytorch_network
from build_tasks.formats.onnx_files import onnx_file, save_onnx, strip_metadata
from build_tasks.runtime.stage import Paths, Settings
from build_tasks.spec.model import Model
from build_tasks.spec.tables import QUANTIZED_PRECISIONS
from build_tasks.tensors import INPUT
from build_tasks.verification import accuracy_samples

if TYPE_CHECKING:
    import numpy as np
    import onnx

# Of the two that modelopt has: with a handful of pictures the extremes serve convolutions better than entropy does.
CALIBRATION_METHOD = "max"
CALIBRATION_SAMPLES = 8  # samples: what memory is foreseen for; as many as there are of one's own are in it at once
LOCK_FILE = "keep_fp32.lock"  # beside the spec: what `doit repair` found


class NothingToQuantizeError(UserError):
    """Every node is spared, or none was worth it."""


class LockedNodes(Struct, forbid_unknown_fields=True):
    """What the lock file says of a precision."""

    keep_fp32: list[str] = []


def inputs_of(model: Model, precision: str) -> Paths:
    own = calibration_source(model, precision)
    by_accuracy = precision in QUANTIZED_PRECISIONS and not own
    return {
        "model.onnx": model.artifact("model.onnx"),
        **({"samples": model.artifact("samples.json")} if by_accuracy else {}),
        **({path: path for path in accuracy_samples.sample_files(own)} if own else {}),
    }


def settings_of(model: Model, precision: str) -> Settings:
    engine, own = model.spec.engine, calibration_source(model, precision)
    return {
        "model": model.name,
        "precision": precision,
        "keep_fp32": engine.keep_fp32,
        "keep_io_types": engine.keep_io_types or precision != "fp16",
        "external_data": model.spec.onnx.external_data,
        "calibration": own,
        **(pytorch_network.settings_of(model) if own else {}),
        **({"input": pytorch_network.input_settings_of(model)} if own else {}),
    }


def tools_of(model: Model, precision: str) -> tuple[str, ...]:
    own = ("timm", "torchvision", "pillow") if calibration_source(model, precision) else ()
    return ("nvidia-modelopt", "onnx", "onnx-graphsurgeon", "onnxruntime", *own)


def convert_graph(
    source: "onnx.ModelProto",
    samples: "np.ndarray | None",
    settings: Settings,
    spared: list[str],
    folder: str,
    rest: str = "fp16",
) -> "onnx.ModelProto":
    """The graph in the precision that the settings say; `source` is left as it is.

    samples: for calibration, where there is any. spared: names of further nodes to keep in fp32 or, in a quantised
    graph, not to quantise. folder: for drafts. rest: the precision of what is not quantised. UserError for what
    modelopt refuses.
    """
    operators, nodes = resolve_keep_fp32(source, settings["keep_fp32"])
    exact = [f"{re.escape(name)}$" for name in spared]
    with tempfile.TemporaryDirectory(dir=folder) as drafts:
        path = f"{drafts}/model.onnx"  # modelopt writes beside what it reads
        save_onnx(source, path, external_data=False)
        path = onnx_file(path)
        if samples is None:
            return strip_metadata(cast_graph(path, operators, [*nodes, *exact], settings))
        return strip_metadata(
            quantize_graph(path, operators, nodes, exact, split_batches(source, samples), settings, rest)
        )


def read_lock(path: str) -> dict[str, LockedNodes]:
    """What the lock file says of each precision; nothing where there is no such file. UserError for another file."""
    try:
        with open(path, "rb") as file:
            return convert(tomllib.load(file), dict[str, LockedNodes])
    except FileNotFoundError:
        return {}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise UserError(f"{path} is not what `doit repair` writes ({error}): delete it, and repair anew") from error


def locked_nodes(path: str, precision: str, graph: "onnx.ModelProto") -> list[str]:
    """The nodes that the lock file spares from a precision. UserError where the graph does not have them."""
    names = read_lock(path).get(precision, LockedNodes()).keep_fp32
    there = {node.name for node in graph.graph.node}
    if missing := [name for name in names if name not in there]:
        raise UserError(
            f"{path}: {precision}: the graph has no node {missing[0]!r}; it has changed since: delete the file, and "
            "repair anew"
        )
    return names


def resolve_keep_fp32(graph: "onnx.ModelProto", entries: list[str]) -> tuple[list[str], list[str]]:
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


def cast_graph(path: str, operators: list[str], nodes: list[str], settings: Settings) -> "onnx.ModelProto":
    """The graph in fp16 or bf16, but for what is named, and for weights that fp16 has no numbers for."""
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
    except Exception as error:  # of onnx, ONNX Runtime or modelopt, which have no common base
        raise UserError(
            f"AutoCast cannot convert the graph to {settings['precision']}: {first_lines(error)}"
        ) from error
    # The shapes that it writes for some attention models contradict each other, and ONNX Runtime refuses the graph.
    del graph.graph.value_info[:]
    return graph


def quantize_graph(
    path: str,
    operators: list[str],
    nodes: list[str],
    spared: list[str],
    samples: "list[np.ndarray]",
    settings: Settings,
    rest: str,
) -> "onnx.ModelProto":
    """The graph with Q/DQ pairs; `rest` elsewhere, or fp32 where `nodes` shall stay so. Not quantised are `spared`."""
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
            nodes_to_exclude=[*nodes, *spared],
            high_precision_dtype="fp32" if nodes else rest,  # fp16 can be refused to operator types only
            use_external_data_format=os.path.exists(f"{path}.data"),
            output_path=draft,
            log_level="WARNING",
        )
        graph = onnx.load(draft)
    except Exception as error:
        raise UserError(f"the graph cannot be quantised to {settings['precision']}: {first_lines(error)}") from error
    if not any(node.op_type == "QuantizeLinear" for node in graph.graph.node):
        raise NothingToQuantizeError(
            f"modelopt finds nothing in the graph that is worth quantising to {settings['precision']}: "
            "engine.precision fp16 is what it would be"
        )
    return graph


def split_batches(graph: "onnx.ModelProto", samples: "np.ndarray") -> "list[np.ndarray]":
    """The samples in batches that the graph takes: all at once, or of its fixed size, the last filled with repeats."""
    import numpy as np

    (tensor,) = graph.graph.input
    size = tensor.type.tensor_type.shape.dim[0].dim_value or len(samples)
    count = -(-len(samples) // size)
    return np.split(np.resize(samples, (count * size, *samples.shape[1:])), count)


def calibration_samples(inputs: Paths, settings: Settings) -> "np.ndarray | None":
    """The samples whose activations set the scales, as clients send them; None for casts."""
    from polygraphy.json import load_json

    if settings["precision"] not in QUANTIZED_PRECISIONS:
        return None
    if settings["calibration"] is None:
        samples: np.ndarray = load_json(inputs["samples"])[0][INPUT]
        return samples
    module = pytorch_network.create_network(settings)
    config, input_format = pytorch_network.data_config(module, settings["input"]), settings["input"]["format"]
    paths = [path for name, path in inputs.items() if name == path]
    _, own = accuracy_samples.load_samples(
        settings["calibration"],
        paths,
        lambda: pytorch_network.transform(config, input_format),
        tuple(config["input_size"]),
        input_format,
    )
    return own


def source_modules(model: Model, precision: str) -> tuple[str, ...]:
    """The project's modules that decide the graph, for the fingerprint of the stages that convert it."""
    modules = (__name__, "build_tasks.formats.onnx_files", "build_tasks.tensors")
    if calibration_source(model, precision) is None:
        return modules
    return (*modules, "build_tasks.verification.accuracy_samples", *pytorch_network.source_modules(model))


def user_source_files(model: Model, precision: str) -> tuple[str, ...]:
    """The user's files that make the network, which only prepares samples of the spec's own."""
    return pytorch_network.user_source_files(model) if calibration_source(model, precision) else ()


def calibration_source(model: Model, precision: str) -> str | None:
    """Samples of the spec's own for calibration, None where it is by the accuracy samples, or there is none."""
    calibration = model.spec.engine.calibration
    return model.source(calibration) if calibration and precision in QUANTIZED_PRECISIONS else None
