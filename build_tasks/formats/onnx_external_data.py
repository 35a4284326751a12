"""The external data of an ONNX file of the user: where its files lie, and how their bytes come into the graph.

A hub's cache holds links: snapshots/<revision>/model.onnx -> blobs/<digest>, and model.onnx_data likewise. onnx refuses
data behind a link, because a hostile graph could read any file of the machine through it. Here a link may lead to where
the user keeps the graph itself: below its folder, or into the folder that the link of the graph leads to.
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from build_tasks.errors import UserError
from build_tasks.spec.model_files import is_below

if TYPE_CHECKING:
    import onnx


def data_locations(graph: "onnx.ModelProto") -> list[str]:
    """Return the names of the files that hold the external data of a graph, relative to its own file."""
    return sorted({_fields(tensor)["location"] for tensor in external_tensors(graph)})


def load_data(graph: "onnx.ModelProto", file: str) -> None:
    """Read the external data of a graph into it.

    Args:
        graph: As it was read from the file, without its external data.
        file: The ONNX file.
    Raises:
        UserError: If a file of the data does not exist, is too short, or lies elsewhere than the graph, or if the place
            of the data in it is no number.
    """
    import onnx

    for tensor in external_tensors(graph):
        fields = _fields(tensor)
        for name in ("offset", "length"):
            if not fields.get(name, "0").isdecimal():
                raise UserError(f"{file}: expected a number as the {name} of {tensor.name!r}, found {fields[name]!r}")
        with open(_data_file(file, fields["location"]), "rb") as data:
            data.seek(int(fields.get("offset", 0)))
            length = int(fields["length"]) if "length" in fields else -1
            tensor.raw_data = data.read(length)
        if len(tensor.raw_data) < length:
            raise UserError(
                f"{file}: {fields['location']} ends before the data of {tensor.name!r}: expected {length} bytes at "
                f"{fields.get('offset', 0)}, found {len(tensor.raw_data)}; copy the file again"
            )
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def external_tensors(graph: "onnx.ModelProto") -> "Iterator[onnx.TensorProto]":
    """Yield the tensors of a graph, also those inside its nodes, whose data is in other files."""
    import onnx

    for nodes, initializers in _scopes(graph.graph):
        inner = (tensor for node in nodes for a in node.attribute for tensor in (*a.tensors, a.t))
        for tensor in (*initializers, *inner):
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                yield tensor


def _scopes(graph: "onnx.GraphProto") -> "Iterator[tuple[list[onnx.NodeProto], list[onnx.TensorProto]]]":
    """Yield the nodes and initializers of a graph and of the graphs inside its nodes."""
    yield list(graph.node), list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _scopes(inner)


def _fields(tensor: "onnx.TensorProto") -> dict[str, str]:
    """Return the location, offset and length of a tensor's data."""
    return {"location": "", **{entry.key: entry.value for entry in tensor.external_data}}


def _data_file(file: str, location: str) -> str:
    """Return the path of a file of external data. It lies beside the ONNX file, or beside the file that this links to.

    Raises:
        UserError: If there is no such file, or if it leads elsewhere.
    """
    folders = [os.path.dirname(os.path.abspath(file)), os.path.dirname(os.path.realpath(file))]
    if os.path.isabs(location) or ".." in location.split("/"):
        raise UserError(f"{file}: expected external data in its own folder, found the path {location!r}")
    for path in (os.path.join(folder, location) for folder in folders):
        if not os.path.isfile(path):
            continue
        if not is_below(os.path.realpath(path), [os.path.realpath(folder) for folder in folders]):
            raise UserError(
                f"{file}: expected external data in its own folder, found {location!r}, which leads to "
                f"{os.path.realpath(path)!r}; copy the file there"
            )
        return path
    raise UserError(f"{file}: its weights are in {location!r}, which does not exist; put that file beside it")
