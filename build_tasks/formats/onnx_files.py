"""ONNX files: how they are saved, and what their graphs declare."""

import os
from typing import TYPE_CHECKING, Any

from build_tasks.runtime import atomic_files

if TYPE_CHECKING:
    import numpy as np
    import onnx

LARGEST_MESSAGE = 2_000_000_000  # bytes; protobuf ends at 2 GiB


def onnx_file(path: str) -> str:
    """The file of an ONNX artifact, which is a folder where the weights are external data."""
    return f"{path}/{os.path.basename(path)}" if os.path.isdir(path) else path


def fixed_batch(path: str) -> int | None:
    """The batch of an ONNX artifact, None where it is open."""
    import onnx

    (image,) = onnx.load(onnx_file(path), load_external_data=False).graph.input
    return image.type.tensor_type.shape.dim[0].dim_value or None


def numpy_dtype(tensor: "onnx.ValueInfoProto") -> "np.dtype[np.generic]":
    """NumPy's type of an input or output of a graph."""
    import onnx

    return onnx.helper.tensor_dtype_to_np_dtype(tensor.type.tensor_type.elem_type)


def opset(graph: "onnx.ModelProto") -> int:
    """The version of ONNX's own operators that the graph uses."""
    return int(next(entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")))


def save_onnx(graph: "onnx.ModelProto", path: str, external_data: bool) -> None:
    """One file; or a folder with the weights apart, as Triton wants it: model.onnx/model.onnx.

    Source of the folder's form: the server's docs, user_guide/model_repository.md, "ONNX Models".
    """
    import onnx

    atomic_files.remove_tree(path)  # of an exporter that was refused
    weights = sum(len(tensor.raw_data) for tensor in graph.graph.initializer)
    if external_data or weights > LARGEST_MESSAGE:
        os.makedirs(path)
        name = os.path.basename(path)
        onnx.save(graph, f"{path}/{name}", save_as_external_data=True, location=f"{name}.data", size_threshold=1024)
    else:
        onnx.save(graph, path)


def signature_tensors(graph: "onnx.ModelProto") -> dict[str, list[dict[str, Any]]]:
    """The signature of the graph: name, NumPy's dtype and shape of each input and output; -1 for an open dimension."""

    def tensor(value: "onnx.ValueInfoProto") -> dict[str, Any]:
        shape = [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim]
        return {"name": value.name, "dtype": numpy_dtype(value).name, "shape": shape}

    return {"inputs": [tensor(v) for v in graph.graph.input], "outputs": [tensor(v) for v in graph.graph.output]}


def strip_metadata(graph: "onnx.ModelProto") -> "onnx.ModelProto":
    """Without what tells of the machine: stack traces, source lines, the exporter's notes."""
    graph.doc_string = graph.graph.doc_string = ""
    del graph.metadata_props[:], graph.graph.metadata_props[:]
    nodes = [*graph.graph.node, *(node for function in graph.functions for node in function.node)]
    for part in (*nodes, *graph.graph.value_info, *graph.graph.input, *graph.graph.output, *graph.graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    return graph
