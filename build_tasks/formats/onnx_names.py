"""The names of tensors in an ONNX graph, which is edited as protobuf (see onnx_import.py)."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def rename_tensors(graph: "onnx.ModelProto", input_names: list[str], output_names: list[str]) -> "onnx.ModelProto":
    """Give the inputs and the outputs of the graph the names that they have in every format.

    A tensor inside the graph that has one of these names gets another one. An output that is an input itself comes from
    a node that copies it, and has another name than the input.
    """
    import onnx

    inputs = {tensor.name for tensor in graph.graph.input}
    used = set(tensors_in(graph.graph))
    for tensor in graph.graph.output:
        if tensor.name in inputs:
            copy = unused_name(tensor.name, used)
            graph.graph.node.append(onnx.helper.make_node("Identity", [tensor.name], [copy]))
            tensor.name = copy
    output_names = [
        unused_name(name, used - {tensor.name}) if name in input_names else name
        for tensor, name in zip(graph.graph.output, output_names, strict=True)
    ]
    names = {tensor.name: name for tensor, name in zip(graph.graph.input, input_names, strict=True)}
    names |= {tensor.name: name for tensor, name in zip(graph.graph.output, output_names, strict=True)}
    names |= {name: unused_name(name, used) for name in sorted(set(names.values()) & (used - names.keys()))}
    _rename(graph.graph, names)
    return graph


def tensors_in(graph: "onnx.GraphProto") -> Iterator[str]:
    """Yield the names of all tensors in a graph, and in the graphs inside its nodes."""
    for node in graph.node:
        yield from (*node.input, *node.output)
        for inner in _inner_graphs(node):
            yield from tensors_in(inner)
    yield from (tensor.name for tensor in (*graph.input, *graph.output, *graph.initializer))


def _inner_graphs(node: "onnx.NodeProto") -> "Iterator[onnx.GraphProto]":
    """Yield the graphs inside a node, such as the branches of an If."""
    for attribute in node.attribute:
        yield from (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else []))


def _rename(graph: "onnx.GraphProto", names: dict[str, str]) -> None:
    """Rename tensors in a graph, and in the graphs inside its nodes, which may use the tensors of this one."""
    for node in graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [names.get(name, name) for name in tensors]
        for inner in _inner_graphs(node):
            _rename(inner, names)
    sparse = (tensor.values for tensor in graph.sparse_initializer)
    for tensor in (*graph.input, *graph.output, *graph.value_info, *graph.initializer, *sparse):
        tensor.name = names.get(tensor.name, tensor.name)


def unused_name(name: str, used: set[str]) -> str:
    """Return a name with a number behind it that no tensor has, and count it as used."""
    candidates = (f"{name}_{number}" for number in itertools.count(1))
    used.add(new := next(candidate for candidate in candidates if candidate not in used))
    return new
