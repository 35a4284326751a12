"""ONNX graphs in which only some nodes have a reduced precision, to measure the error that each node causes.

    fp16, bf16   casts around the nodes: their inputs and outputs are rounded
    int8, fp8    the quantized graph, with the Q/DQ pairs before these nodes only

The graphs are for ONNX Runtime and are never saved. verification/node_sensitivity.py ranks the nodes by what is
measured with them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

QDQ_OPERATORS = ("QuantizeLinear", "DequantizeLinear")


def emulate_nodes(model: "onnx.ModelProto", precision: str) -> "Callable[[set[str]], onnx.ModelProto]":
    """Return a function from names of nodes to the graph in which only these nodes read and write `precision`.

    A rounded value is cast to the precision and back, and the node computes in fp32.

    Args:
        model: The fp32 graph. It stays as it is.
        precision: "fp16" or "bf16".
    """
    import numpy as np
    import onnx
    import onnx_graphsurgeon as gs

    reduced = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    original = gs.import_onnx(onnx.shape_inference.infer_shapes(model))

    def casts(exact: Any, rounded: Any) -> list[Any]:
        low = gs.Variable(f"{rounded.name}.low")
        return [
            gs.Node("Cast", attrs={"to": reduced}, inputs=[exact], outputs=[low]),
            gs.Node("Cast", attrs={"to": onnx.TensorProto.FLOAT}, inputs=[low], outputs=[rounded]),
        ]

    def emulate(names: set[str]) -> "onnx.ModelProto":
        graph = original.copy()
        rounded_inputs: dict[str, Any] = {}
        nodes: list[Any] = []
        for node in graph.nodes:
            after: list[Any] = []
            if node.name in names:
                for index, tensor in enumerate(node.inputs):
                    if tensor.dtype == np.float32:
                        if tensor.name not in rounded_inputs:
                            rounded_inputs[tensor.name] = gs.Variable(f"{tensor.name}.in")
                            nodes += casts(tensor, rounded_inputs[tensor.name])
                        node.inputs[index] = rounded_inputs[tensor.name]
                for index, tensor in enumerate(node.outputs):
                    if tensor.dtype == np.float32:
                        node.outputs[index] = gs.Variable(f"{tensor.name}.exact")
                        after += casts(node.outputs[index], tensor)
            nodes += [node, *after]
        graph.nodes = nodes
        emulated: onnx.ModelProto = gs.export_onnx(graph)
        return emulated

    return emulate


def keep_qdq_for(model: "onnx.ModelProto", names: set[str]) -> "onnx.ModelProto":
    """Return a quantized graph with the Q/DQ pairs before these nodes only. `model` stays as it is."""
    import onnx_graphsurgeon as gs

    graph = gs.import_onnx(model)

    def before_qdq(tensor: Any) -> Any:
        while tensor.inputs and tensor.inputs[0].op in QDQ_OPERATORS:
            tensor = tensor.inputs[0].inputs[0]
        return tensor

    for node in graph.nodes:
        if node.op not in QDQ_OPERATORS and node.name not in names:
            node.inputs = [before_qdq(tensor) for tensor in node.inputs]
    reduced: onnx.ModelProto = gs.export_onnx(graph.cleanup())
    return reduced
