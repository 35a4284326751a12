"""ONNX files: how they are saved, and the tensors and opset that their graphs declare."""

import os
from typing import TYPE_CHECKING

from build_tasks.errors import UserError, listed
from build_tasks.runtime import atomic_files
from build_tasks.tensors import Signature, TensorSignature

if TYPE_CHECKING:
    import numpy as np
    import onnx

MAX_MESSAGE_BYTES = 2_000_000_000  # protobuf messages must be smaller than 2 GiB
MIN_EXTERNAL_BYTES = 1024  # smaller weights stay in the graph


def onnx_file(path: str) -> str:
    """Return the file of an ONNX artifact. The artifact is a folder if its weights are external data."""
    return f"{path}/{os.path.basename(path)}" if os.path.isdir(path) else path


def check_folder(path: str) -> None:
    """Raise UserError if a path is a folder without the file of its name. The message names the ONNX files in it."""
    if os.path.isdir(path) and not os.path.exists(onnx_file(path)):
        names = listed(sorted(name for name in os.listdir(path) if name.endswith(".onnx")))
        raise UserError(
            f"{path} is a folder: expected an ONNX file, or a folder with {os.path.basename(path)} in it, found "
            f"{names or 'no file of ONNX'}"
        )


def fixed_batch(path: str) -> int | None:
    """Return the batch size of an ONNX artifact. None if it is open."""
    import onnx

    first = onnx.load(onnx_file(path), load_external_data=False).graph.input[0]
    return first.type.tensor_type.shape.dim[0].dim_value or None


def tensor_names(path: str) -> tuple[list[str], list[str]]:
    """Return the names of the inputs and of the outputs of an ONNX artifact."""
    import onnx

    graph = onnx.load(onnx_file(path), load_external_data=False).graph
    return [tensor.name for tensor in graph.input], [tensor.name for tensor in graph.output]


def numpy_dtype(tensor: "onnx.ValueInfoProto") -> "np.dtype[np.generic]":
    """Return NumPy's dtype of an input or output of a graph."""
    import onnx

    return onnx.helper.tensor_dtype_to_np_dtype(tensor.type.tensor_type.elem_type)


def opset(graph: "onnx.ModelProto") -> int:
    """Return the version of ONNX's own operators that the graph uses."""
    return int(next(entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")))


def save_onnx(graph: "onnx.ModelProto", path: str, external_data: bool) -> None:
    """Save a graph as one file, or as a folder with the weights in a second file: model.onnx/model.onnx.

    Triton expects this form of the folder. Source: the server's docs, user_guide/model_repository.md, "ONNX Models".

    Args:
        graph: The graph with its weights.
        path: The file or folder, which is replaced.
        external_data: Whether to save a folder. Weights above MAX_MESSAGE_BYTES always need one.
    """
    import onnx

    atomic_files.remove_tree(path)  # another exporter may have written it
    weights = sum(len(tensor.raw_data) for tensor in graph.graph.initializer)
    if external_data or weights > MAX_MESSAGE_BYTES:
        os.makedirs(path)
        name = os.path.basename(path)
        onnx.save(
            graph,
            f"{path}/{name}",
            save_as_external_data=True,
            location=f"{name}.data",
            size_threshold=MIN_EXTERNAL_BYTES,
        )
        onnx.load_external_data_for_model(graph, path)  # onnx has moved the weights out of the graph
    else:
        onnx.save(graph, path)


def signature_tensors(graph: "onnx.ModelProto") -> Signature:
    """Return the name, NumPy's dtype and the shape of each input and output; -1 for an open dimension."""

    def tensor(value: "onnx.ValueInfoProto") -> TensorSignature:
        shape = [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim]
        dtype = numpy_dtype(value).name
        return {"name": value.name, "dtype": "string" if dtype == "object" else dtype, "shape": shape}

    return {"inputs": [tensor(v) for v in graph.graph.input], "outputs": [tensor(v) for v in graph.graph.output]}


# Operators whose outputs have a size that depends on the values of their inputs, or that may contain such operators.
SIZED_BY_VALUES = {"NonZero", "NonMaxSuppression", "Unique", "Compress", "If", "Loop", "Scan"}


def foreign_node(graph: "onnx.ModelProto") -> "onnx.NodeProto | None":
    """Return the first node whose operator ONNX does not define, such as those of ONNX Runtime; None without one."""
    return next((node for node in graph.graph.node if node.domain not in ("", "ai.onnx", "ai.onnx.ml")), None)


def shared_scale(graph: "onnx.ModelProto") -> str | None:
    """Return the type of the first operator that takes one scale for a whole batch; None without one.

    Such a scale is computed from the values, so that the answer to a sample depends on the other samples of its batch.
    """
    return next((node.op_type for node in graph.graph.node if node.op_type.startswith("DynamicQuantize")), None)


def close_dimensions(graph: "onnx.ModelProto", answers: list[list[tuple[int, ...]]]) -> None:
    """Declare the open dimensions of the outputs that had one size in all answers. The first is the batch's.

    If an input has an open dimension besides the batch, nothing changes: another size may answer otherwise. The same
    holds for a graph in which values decide about sizes.

    Args:
        graph: The graph, which is changed.
        answers: The shapes of the outputs, for each batch that was run.
    """
    if any(not d.HasField("dim_value") for v in graph.graph.input for d in v.type.tensor_type.shape.dim[1:]):
        return
    if any(node.op_type in SIZED_BY_VALUES for node in graph.graph.node):
        return
    for value, shapes in zip(graph.graph.output, zip(*answers, strict=True), strict=True):
        declared = value.type.tensor_type.shape.dim
        for axis in range(1, min(len(declared), len(shapes[0]))):
            sizes = {shape[axis] for shape in shapes}
            if not declared[axis].HasField("dim_value") and len(sizes) == 1:
                declared[axis].dim_value = sizes.pop()


def strip_metadata(graph: "onnx.ModelProto") -> "onnx.ModelProto":
    """Remove stack traces, source lines and notes of the exporter, which differ between machines."""
    graph.doc_string = graph.graph.doc_string = ""
    del graph.metadata_props[:], graph.graph.metadata_props[:]
    nodes = [*graph.graph.node, *(node for function in graph.functions for node in function.node)]
    for part in (*nodes, *graph.graph.value_info, *graph.graph.input, *graph.graph.output, *graph.graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    return graph
