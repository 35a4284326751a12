"""ONNX files of networks that have the batch in another dimension: the graph transposes, and clients send it first.

input (batch, time, features) ─► Transpose ─► the graph of the file ─► Transpose ─► output (batch, time, classes)
"""

from typing import TYPE_CHECKING

from build_tasks.errors import UserError
from build_tasks.formats.onnx_names import rename_tensors, tensors_in, unused_name

if TYPE_CHECKING:
    import onnx


def put_batch_first(graph: "onnx.ModelProto", path: str, inputs: list[int], outputs: list[int]) -> None:
    """Insert nodes that transpose inputs and outputs, so that the batch is the first dimension of all of them.

    Args:
        graph: The graph. Its inputs and outputs keep their names and their order.
        path: Its file, for messages.
        inputs: The dimension of the batch in each input.
        outputs: The same of the first outputs; the others have it first.
    Raises:
        UserError: If an output has no such dimension, or if the file does not say how many it has.
    """
    import onnx

    if not any(inputs) and not any(outputs):
        return
    names = [tensor.name for tensor in graph.graph.input], [tensor.name for tensor in graph.graph.output]
    used = {*tensors_in(graph.graph)}
    inner = [[unused_name(name, used) for name in tensors] for tensors in names]
    rename_tensors(graph, *inner)
    ranks = [_rank(graph, tensor) for tensor in graph.graph.output]
    before, after = [], []
    for tensor, name, axis in zip(graph.graph.input, names[0], inputs, strict=True):
        count = len(tensor.type.tensor_type.shape.dim)
        order = [*range(1, axis + 1), 0, *range(axis + 1, count)]
        before.append(onnx.helper.make_node("Transpose", [name], [tensor.name], perm=order))
        _reorder(tensor, name, [axis, *(each for each in range(count) if each != axis)])
    for index, (tensor, name, rank) in enumerate(zip(graph.graph.output, names[1], ranks, strict=True)):
        axis = outputs[index] if index < len(outputs) else 0
        if axis and (rank is None or axis >= rank):
            found = "no number of dimensions for it" if rank is None else f"{rank} dimensions"
            raise UserError(f"outputs[{index}].batch_dimension: {path} declares {found}, and the spec gives {axis}")
        order = [axis, *(each for each in range(rank or 0) if each != axis)]
        node = onnx.helper.make_node("Transpose", [tensor.name], [name], perm=order)
        after.append(node if axis else onnx.helper.make_node("Identity", [tensor.name], [name]))
        _reorder(tensor, name, order)
    nodes = [*before, *graph.graph.node, *after]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


def _rank(graph: "onnx.ModelProto", tensor: "onnx.ValueInfoProto") -> int | None:
    """Return the number of dimensions of an output; None if neither the file nor shape inference has it."""
    import onnx

    if tensor.type.tensor_type.HasField("shape"):
        return len(tensor.type.tensor_type.shape.dim)
    inferred = {each.name: each for each in onnx.shape_inference.infer_shapes(graph).graph.output}
    found = inferred[tensor.name].type.tensor_type
    return len(found.shape.dim) if found.HasField("shape") else None


def _reorder(tensor: "onnx.ValueInfoProto", name: str, order: list[int]) -> None:
    """Give an input or output its name, and its dimensions in another order."""
    tensor.name = name
    if tensor.type.tensor_type.HasField("shape"):
        dims = list(tensor.type.tensor_type.shape.dim)
        copies = [type(dim).FromString(dim.SerializeToString()) for dim in dims]
        del tensor.type.tensor_type.shape.dim[:]
        tensor.type.tensor_type.shape.dim.extend(copies[index] for index in order)
