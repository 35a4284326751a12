"""ONNX files of the user: read, and set to the names and dimensions of the spec.

    models/<model>/….onnx ─► match_inputs, select_outputs ─► rename_tensors ─► declare_dims ─► stages/onnx.py

The graphs are edited as protobuf, which leaves the rest of a file as it is. onnx-graphsurgeon 0.6.1 builds the whole
file again and loses parts of it: it removes the metadata and every attribute that is a type, refuses an attribute that
is an empty list, and copies a weight that the branches of an If node share into each of them.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError, first_lines, listed, with_suggestion
from build_tasks.formats import onnx_external_data, onnx_files
from build_tasks.formats.example_inputs import example_inputs
from build_tasks.formats.file_kinds import reject_other_kinds
from build_tasks.formats.onnx_files import onnx_file
from build_tasks.formats.ragged_batches import Ragged, dims_of
from build_tasks.formats.serving_interface import forward, open_output_axes
from build_tasks.runtime.stage import Settings
from build_tasks.tensors import BATCH, Interface, dims_at, tuned_lengths

if TYPE_CHECKING:
    import onnx
    import torch

CHANNELS = (1, 3, 4)  # numbers of channels of pictures: gray, RGB, RGBA
MIN_IR_VERSION = 4  # the first in which initializers need not be listed as inputs


def read_onnx(path: str) -> "onnx.ModelProto":
    """Read an ONNX file, or a folder with its weights in other files.

    The graph is not checked here. ONNX Runtime checks it later, because onnx's checker also reports shapes
    that no server needs.

    Raises:
        UserError: If the file is not ONNX, if data is missing, or if two inputs or outputs have one name.
    """
    import onnx

    file = onnx_file(path)
    onnx_files.check_folder(path)
    reject_other_kinds(file, "ONNX")
    try:
        graph = onnx.load(file, load_external_data=False)
    except Exception as error:  # from onnx, from protobuf, or from the file system
        raise UserError(f"{path} cannot be read as ONNX: {first_lines(error)}") from error
    onnx_external_data.load_data(graph, file)
    with report_damage(path):
        _open_unknown_dims(graph.graph)
        _checktensors_in(graph.graph, path)
    return graph


@contextlib.contextmanager
def report_damage(path: str) -> Iterator[None]:
    """Raise UserError in place of protobuf's error about a name that is not UTF-8, or a type that does not exist.

    Reading a file does not find them; the first use does.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path} cannot be read as ONNX: {first_lines(error)}") from error


def external_files(path: str) -> list[str]:
    """Return the names of the files beside an ONNX file that hold its weights; none if it cannot be read."""
    import onnx

    try:
        return onnx_external_data.data_locations(onnx.load(onnx_file(path), load_external_data=False))
    except Exception:  # read_onnx reports it
        return []


def _open_unknown_dims(graph: "onnx.GraphProto") -> None:
    """Leave the dimensions open that a graph declares as -1 or 0, as exporters of Paddle do."""
    wrong = False
    for tensor in (*graph.input, *graph.output):
        for dim in tensor.type.tensor_type.shape.dim:
            if dim.HasField("dim_value") and dim.dim_value <= 0:
                dim.ClearField("dim_value")
                wrong = True
    if wrong:  # then the shapes of the tensors between them are wrong, too
        del graph.value_info[:]


def _checktensors_in(graph: "onnx.GraphProto", path: str) -> None:
    """Raise UserError if two inputs or two outputs have the same name."""
    for kind, tensors in (("inputs", graph.input), ("outputs", graph.output)):
        names = [tensor.name for tensor in tensors]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(
                f"{path}: expected {kind} with different names, found two called {twice!r}; export the file again"
            )


def check_output_types(graph: "onnx.ModelProto", path: str) -> None:
    """Raise UserError if an output is no tensor: a server has no type for sequences and maps."""
    for output in graph.graph.output:
        if (kind := output.type.WhichOneof("value")) not in (None, "tensor_type"):
            found = f"{output.name!r}, a {kind.removesuffix('_type')}, as ZipMap makes it"
            raise UserError(f"{path}: expected outputs that are tensors, found {found}: choose others in [[outputs]]")


def check_answers(answers: "list[torch.Tensor]", graph: "onnx.ModelProto", path: str) -> None:
    """Raise UserError if a graph answers NaN or infinity that are in its weights, which are named, or NaN alone."""
    import numpy as np
    from onnx import TensorProto, numpy_helper

    if not any(bool(each.isnan().any()) for each in answers) and any(bool(each.isfinite().any()) for each in answers):
        return
    # Infinity may belong to a mask, and a NaN in a part of the answers comes from the random inputs.
    is_broken = np.isnan if any(bool(each.isfinite().any()) for each in answers) else lambda each: ~np.isfinite(each)
    weights = [tensor for tensor in graph.graph.initializer if tensor.data_type == TensorProto.FLOAT]
    names = [tensor.name for tensor in weights if is_broken(numpy_helper.to_array(tensor)).any()]
    if names or all(bool(each.isnan().all()) for each in answers):
        reason = f"these are in {', '.join(names[:4])}: train it again" if names else "no weight holds these"
        raise UserError(f"{path} answers NaN or infinity; {reason}")


def remove_weights_from_inputs(graph: "onnx.ModelProto") -> None:
    """Remove the initializers that old files also list as inputs from this list."""
    initializers = {tensor.name for tensor in graph.graph.initializer}
    for tensor in [tensor for tensor in graph.graph.input if tensor.name in initializers]:
        graph.graph.input.remove(tensor)
        graph.ir_version = max(graph.ir_version, MIN_IR_VERSION)


def check_image_input(graph: "onnx.ModelProto", path: str) -> list[int | None]:
    """Return the dimensions of the only input, batch first; None for an open one.

    Raises:
        UserError: If the graph does not have one input of float32 (batch, channels, height, width).
    """
    import onnx

    remove_weights_from_inputs(graph)
    found = ", ".join(f"{tensor.name} {format_dims(dimensions(tensor))}" for tensor in graph.graph.input)
    if len(graph.graph.input) != 1:
        raise UserError(
            f"{path}: expected one input of images, found {len(graph.graph.input)}: {found or 'none'}; "
            "describe them in [[inputs]]"
        )
    (tensor,) = graph.graph.input
    dims, element_type = dimensions(tensor), onnx.TensorProto.DataType.Name(tensor.type.tensor_type.elem_type)
    if len(dims) != 4 or element_type != "FLOAT":
        raise UserError(
            f"{path}: expected FLOAT (batch, channels, height, width), found {element_type} {found}; describe it in "
            "[[inputs]]"
        )
    if dims[3] in CHANNELS and dims[1] not in (None, *CHANNELS):
        raise UserError(
            f"{path}: expected (batch, channels, height, width), found {found}, with the channels last: "
            "describe it in [[inputs]], or export it with the channels first"
        )
    return dims


def match_inputs(
    graph: "onnx.ModelProto",
    path: str,
    interface: Interface,
    batch_dimensions: list[int],
    ragged: Ragged | None,
) -> None:
    """Bring the inputs of a graph into the order of the spec: by name if it has all names, otherwise as they are.

    Args:
        graph: The graph.
        path: Its file, for messages.
        interface: The interface of the spec.
        batch_dimensions: The dimension of the batch in each input of the file.
        ragged: Which inputs the network takes in one row.
    Raises:
        UserError: If it has other inputs than the spec: in number, name, type or dimensions.
    """
    remove_weights_from_inputs(graph)
    own = {tensor.name: tensor for tensor in graph.graph.input}
    names = [each["name"] for each in interface["inputs"]]
    takes = ", ".join(f"{name} {input_dtype(each)}{format_dims(dimensions(each))}" for name, each in own.items())
    unknown = [name for name in names if name not in own]
    if 0 < len(unknown) < len(names):
        raise UserError(f"inputs: {path} has no input {with_suggestion(unknown[0], own)}: it takes {takes}")
    if len(own) != len(names):
        raise UserError(f"inputs: {path} takes {takes}, and the spec gives {', '.join(names)}")
    ordered = [*own.values()] if unknown else [own[name] for name in names]
    lengths = tuned_lengths(interface["dimensions"])
    if scalar := next((tensor.name for tensor in ordered if is_scalar(tensor)), None):
        raise UserError(f"inputs: {path}: {without_batch(scalar)}")
    for tensor, each, axis in zip(ordered, interface["inputs"], batch_dimensions, strict=True):
        shape = [] if ragged and each["name"] in ragged["inputs"] else [*(each["shape"] or [])]
        dims, declared = dimensions(tensor), dims_at(shape, lengths)
        dims = dims[:axis] + dims[axis + 1 :]
        fits = len(dims) == len(declared) and all(a in (None, b) for a, b in zip(dims, declared, strict=True))
        if input_dtype(tensor) != each["dtype"] or not fits or not dimensions(tensor):
            found = f"{each['dtype']}{[*shape[:axis], 'batch', *shape[axis:]]}".replace("'", "")
            raise UserError(
                f"inputs: {path} takes {input_dtype(tensor)}{format_dims(dimensions(tensor))} as {tensor.name}, and "
                f"the spec gives {found}"
            )
    moved = [type(tensor).FromString(tensor.SerializeToString()) for tensor in ordered]
    del graph.graph.input[:]
    graph.graph.input.extend(moved)


def is_scalar(tensor: "onnx.ValueInfoProto") -> bool:
    """Return whether an input or output is declared without dimensions; one of an unknown rank is not."""
    return tensor.type.tensor_type.HasField("shape") and not tensor.type.tensor_type.shape.dim


def without_batch(name: str) -> str:
    """Return the message about an input that is one value for a whole batch."""
    return (
        f"expected inputs with a batch, found {name}, one value for all samples of a batch, which clients cannot send: "
        'make it a constant of the file (docs/how-to/tensors.md, "An input without a batch")'
    )


def input_dtype(tensor: "onnx.ValueInfoProto") -> str:
    """Return NumPy's name of the type of an input or output; "string" for strings."""
    name = onnx_files.numpy_dtype(tensor).name
    return "string" if name == "object" else name


def select_outputs(graph: "onnx.ModelProto", path: str, keys: list[str | int | None], names: list[str]) -> None:
    """Leave only the outputs of [[outputs]] in a graph, in their order.

    Args:
        graph: The graph.
        path: Its file, for messages.
        keys: The name or the index of each output. None: that of the same name, or in the same place if none has it.
        names: The names that the outputs will have.
    Raises:
        UserError: If the graph has no such output.
    """
    own = {tensor.name: tensor for tensor in graph.graph.output}
    ordered: list[Any] = []
    for index, (key, name) in enumerate(zip(keys, names, strict=True)):
        place = key if key is not None else name if name in own else index
        if isinstance(place, int) and place < len(own):
            place = [*own][place]
        if place not in own:
            raise UserError(f"outputs[{index}].key: {path} has the outputs {listed(own)}, and not {place!r}")
        if place in (places := [tensor.name for tensor in ordered]):
            other = f"another output of {path} than that of outputs[{places.index(place)}]"
            raise UserError(f"outputs[{index}].key: expected {other}, found {place!r} again")
        ordered.append(type(own[place]).FromString(own[place].SerializeToString()))
    del graph.graph.output[:]
    graph.graph.output.extend(ordered)


def dimensions(tensor: "onnx.ValueInfoProto") -> list[int | None]:
    """Return the dimensions of an input or output; None for an open one."""
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.type.tensor_type.shape.dim]


def format_dims(dims: list[int | None]) -> str:
    """Format dimensions for messages, with a question mark for an open one."""
    return f"[{', '.join('?' if length is None else str(length) for length in dims)}]"


def declare_dims(graph: "onnx.ModelProto", network: Any, interface: Interface, settings: Settings) -> "onnx.ModelProto":
    """Declare the batch and the dimensions of the spec in the inputs and outputs of a graph, fixed or open.

    Only the declarations change. A node that was made for another batch fails when the graph runs.

    Args:
        graph: The graph, with the names of rename_tensors.
        network: The same graph as a network, which is run to find the shapes of the outputs.
        interface: The interface of the spec.
        settings: The settings of the onnx stage.
    """
    batch = BATCH if settings["dynamic_axes"] else settings["batch_size"]
    ragged = settings["ragged"]
    outputs = forward(network, example_inputs(interface, 1))
    words = open_output_axes(network, interface)
    for tensor, each in zip(graph.graph.input, interface["inputs"], strict=True):
        _set_dims(tensor, dims_of(each["name"], ragged, [batch, *(each["shape"] or [])]))
    for tensor, output, axes in zip(graph.graph.output, outputs, words, strict=True):
        dims = [
            axes[axis] or f"{tensor.name}_{axis}" if axis in axes else length
            for axis, length in enumerate(output.shape)
        ]
        _set_dims(tensor, dims_of(tensor.name, ragged, [batch, *dims[1:]]))
    del graph.graph.value_info[:]
    return graph


def _set_dims(tensor: "onnx.ValueInfoProto", dims: list[int | str]) -> None:
    """Declare the dimensions of a tensor; a name stands for an open one."""
    del tensor.type.tensor_type.shape.dim[:]
    for length in dims:
        dim = tensor.type.tensor_type.shape.dim.add()
        if isinstance(length, str):
            dim.dim_param = length
        else:
            dim.dim_value = length


def pack_onnx(file: str, scratch: str) -> str:
    """Return the path to copy into the folder of a spec: the file, or a folder if its weights are in other files.

    Args:
        file: The user's file.
        scratch: A folder in which the second form is made.
    """
    import onnx

    graph = onnx.load(onnx_file(file), load_external_data=False)
    if not onnx_external_data.data_locations(graph):
        return onnx_file(file)
    onnx_files.save_onnx(read_onnx(file), f"{scratch}/model.onnx", external_data=True)
    return f"{scratch}/model.onnx"
