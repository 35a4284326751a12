"""How far an artifact is from what it stands for, and how an artifact is run."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import onnx

# The PyTorch backend's convention, kept in every format, so that a client changes nothing but the model's name.
# Source: the server's docs, user_guide/model_configuration.md, "Inputs and Outputs".
INPUT, OUTPUT = "INPUT__0", "OUTPUT__{}"


def relative_error(found: "np.ndarray", expected: "np.ndarray") -> float:
    """The L2 norm of the difference over the norm of what is expected; inf where shape, dtype or a NaN forbids it."""
    import numpy as np

    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return float("inf")
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf")
    difference = np.linalg.norm(found.astype(np.float64) - expected.astype(np.float64))
    return float(difference / max(np.linalg.norm(expected.astype(np.float64)), np.finfo(np.float64).tiny))


def disagreement(found: "list[np.ndarray]", expected: "list[np.ndarray]") -> float:
    """The largest relative error of any output; inf where their number differs."""
    if len(found) != len(expected):
        return float("inf")
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


def onnx_file(path: str) -> str:
    """The file of an ONNX artifact, which is a folder where the weights are external data."""
    return f"{path}/{os.path.basename(path)}" if os.path.isdir(path) else path


def onnx_session(path: str) -> "Callable[[np.ndarray], list[np.ndarray]]":
    """An ONNX artifact in ONNX Runtime on the CPU, as a function from a batch to its outputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file(path), providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {INPUT: batch})


def reduced_session(path: str) -> "Callable[[np.ndarray], list[np.ndarray]]":
    """A graph of reduced precision in ONNX Runtime on the CPU, with the rounding that it asks for.

    ONNX Runtime's optimisations are off. On a CPU they take casts to fp16 and back for nothing, and of 1.32 they
    fold Q/DQ pairs with fp16 scales wrongly (relative error 2.0 for one of 0.36).
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    graph = onnx.load(onnx_file(path))
    source = rounded(graph).SerializeToString() if computes_bf16(graph) else onnx_file(path)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    (wanted,) = (np_type(tensor) for tensor in graph.graph.input)
    return lambda batch: session.run(None, {INPUT: batch.astype(wanted)})


def np_type(tensor: "onnx.ValueInfoProto") -> "np.dtype[np.generic]":
    """NumPy's type of an input or output of a graph."""
    import onnx

    return onnx.helper.tensor_dtype_to_np_dtype(tensor.type.tensor_type.elem_type)


def computes_bf16(graph: "onnx.ModelProto") -> bool:
    import onnx

    return any(tensor.data_type == onnx.TensorProto.BFLOAT16 for tensor in graph.graph.initializer)


def rounded(graph: "onnx.ModelProto") -> "onnx.ModelProto":
    """The same graph with its bf16 arithmetic done in fp32, and every result rounded to bf16.

    ONNX Runtime has no bf16 kernels for CPUs. A GPU's matrix units, too, multiply bf16 and add up in fp32.
    """
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    bf16 = TensorProto.BFLOAT16

    def widened(tensor: TensorProto) -> TensorProto:
        if tensor.data_type != bf16:
            return tensor
        return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)

    typed = onnx.shape_inference.infer_shapes(graph).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*typed.value_info, *typed.output, *typed.input)}
    nodes = []
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                attribute.t.CopyFrom(widened(attribute.t))
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == bf16:
                attribute.i = TensorProto.FLOAT
        nodes.append(node)
        for index, name in enumerate(node.output):
            if types.get(name) == bf16:
                node.output[index] = f"{name}.exact"
                nodes.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.bf16"], to=bf16))
                nodes.append(helper.make_node("Cast", [f"{name}.bf16"], [name], to=TensorProto.FLOAT))
    initializers = [widened(tensor) for tensor in graph.graph.initializer]
    del graph.graph.node[:], graph.graph.initializer[:], graph.graph.value_info[:]
    graph.graph.node.extend(nodes)
    graph.graph.initializer.extend(initializers)
    return graph
