"""ONNX files of the user: read, renamed and set to the batch and size that the spec asks for."""

from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError, first_lines
from build_tasks.formats import onnx_files, pytorch_network
from build_tasks.formats.onnx_files import onnx_file
from build_tasks.runtime.stage import Settings
from build_tasks.tensors import INPUT, OUTPUT

if TYPE_CHECKING:
    import onnx

CHANNELS = (1, 3, 4)  # of pictures: grey, RGB, RGBA


def read_onnx(path: str) -> "onnx.ModelProto":
    """The graph of an ONNX file, or of a folder with its weights apart. UserError where it is none.

    Whether it is sound is ONNX Runtime's to say: onnx's checker misses shapes that no server needs, too.
    """
    import onnx

    try:
        return onnx.load(onnx_file(path))
    except Exception as error:  # of onnx, of protobuf, or of the file system
        raise UserError(f"{path} cannot be read as ONNX: {first_lines(error)}") from error


def check_image_input(graph: "onnx.ModelProto", path: str) -> list[int | None]:
    """Its dimensions, batch first; None for an open one. UserError where it is not (batch, channels, height, width).

    What old files list as inputs because they have values for it is taken off that list.
    """
    import onnx

    valued = {tensor.name for tensor in graph.graph.initializer}
    for tensor in [tensor for tensor in graph.graph.input if tensor.name in valued]:
        graph.graph.input.remove(tensor)
        graph.ir_version = max(graph.ir_version, 4)  # the first in which the others need not be inputs
    found = ", ".join(f"{tensor.name} {format_dims(dimensions(tensor))}" for tensor in graph.graph.input)
    if len(graph.graph.input) != 1:
        raise UserError(f"{path}: expected one input of images, found {len(graph.graph.input)}: {found or 'none'}")
    (tensor,) = graph.graph.input
    image, element_type = dimensions(tensor), onnx.TensorProto.DataType.Name(tensor.type.tensor_type.elem_type)
    if len(image) != 4 or element_type != "FLOAT":
        raise UserError(f"{path}: expected FLOAT (batch, channels, height, width), found {element_type} {found}")
    if image[3] in CHANNELS and image[1] not in (None, *CHANNELS):
        raise UserError(
            f"{path}: expected (batch, channels, height, width), found {found}, with the channels last: "
            "export it with the channels first"
        )
    return image


def dimensions(tensor: "onnx.ValueInfoProto") -> list[int | None]:
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.type.tensor_type.shape.dim]


def format_dims(dims: list[int | None]) -> str:
    return f"[{', '.join('?' if length is None else str(length) for length in dims)}]"


def rename_tensors(graph: "onnx.ModelProto") -> "onnx.ModelProto":
    """The graph with its input and outputs called as in every format."""
    names = {tensor.name: INPUT for tensor in graph.graph.input}
    names |= {tensor.name: OUTPUT.format(index) for index, tensor in enumerate(graph.graph.output)}
    _rename(graph.graph, names)
    return graph


def _rename(graph: "onnx.GraphProto", names: dict[str, str]) -> None:
    """In the nodes of the graph, and in those of the graphs in them, which may use its tensors."""
    for node in graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [names.get(name, name) for name in tensors]
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                _rename(inner, names)
    for tensor in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        tensor.name = names.get(tensor.name, tensor.name)


def set_batch_and_size(graph: "onnx.ModelProto", network: Any, settings: Settings) -> "onnx.ModelProto":
    """The graph with the batch and the size that the spec says, fixed or open, whatever was written into the file.

    What in between was made for another batch shows when the graph is run.
    """
    shape, sizes = settings["shape"], settings["sizes"]
    batch = "batch" if settings["dynamic_axes"] else settings["batch_size"]
    size = ["height", "width"] if sizes else shape[1:]
    answers = pytorch_network.forward(network, pytorch_network.example_input(shape, 1))
    opened = pytorch_network.size_dependent_axes(network, shape, sizes, "fp32_nchw")
    _set_dims(graph.graph.input[0], [batch, shape[0], *size])
    for tensor, answer, axes in zip(graph.graph.output, answers, opened, strict=True):
        rest = [f"{tensor.name}_{axis}" if axis in axes else length for axis, length in enumerate(answer.shape)]
        _set_dims(tensor, [batch, *rest[1:]])
    del graph.graph.value_info[:]
    return graph


def _set_dims(tensor: "onnx.ValueInfoProto", shape: list[int | str]) -> None:
    del tensor.type.tensor_type.shape.dim[:]
    for length in shape:
        dim = tensor.type.tensor_type.shape.dim.add()
        if isinstance(length, str):
            dim.dim_param = length
        else:
            dim.dim_value = length


def pack_onnx(file: str, scratch: str) -> str:
    """The file as it belongs beside a spec: as it is, or a folder where its weights are in other files."""
    import onnx

    graph = onnx.load(onnx_file(file), load_external_data=False)
    if all(tensor.data_location != onnx.TensorProto.EXTERNAL for tensor in graph.graph.initializer):
        return onnx_file(file)
    onnx_files.save_onnx(read_onnx(file), f"{scratch}/model.onnx", external_data=True)
    return f"{scratch}/model.onnx"
