"""The inputs and outputs of a ModelConfig, derived from the tensors of an artifact.

tensors of the network ─┬► input, output     what clients send and get, in another shape if the spec says so
                        └► control_input, state, batch_input   what Triton fills and keeps itself
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from build_tasks.errors import with_suggestion
from build_tasks.tensors import Signature, TensorSignature
from build_tasks.triton.model_config import Mistake, enum, protobuf
from build_tasks.triton.sequence_checks import control_type

# Triton's name of each NumPy dtype. Source: the server's docs, model_configuration.md, "Datatypes".
DTYPES = {
    "bool": "TYPE_BOOL", "uint8": "TYPE_UINT8", "uint16": "TYPE_UINT16", "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64", "int8": "TYPE_INT8", "int16": "TYPE_INT16", "int32": "TYPE_INT32",
    "int64": "TYPE_INT64", "float16": "TYPE_FP16", "float32": "TYPE_FP32", "float64": "TYPE_FP64",
    "bfloat16": "TYPE_BF16", "bytes": "TYPE_STRING", "string": "TYPE_STRING",
}  # fmt: skip


class ClientView(Struct, frozen=True):
    """How clients see a tensor, if they see it otherwise than the network.

    Attributes:
        dims: Its dims without the batch, -1 for an open one. None: those of the network.
        ragged: Whether requests of several lengths form one batch, in which the network sees all their values in a row.
    """

    dims: list[int] | None = None
    ragged: bool = False


class TritonTensor(Struct, frozen=True):
    """A tensor of the network that Triton fills or keeps itself.

    Attributes:
        key: The field of the ModelConfig that names it.
        dtype: "TYPE_FP32", for example.
        dims: Without the batch; None if they follow from the requests.
    """

    key: str
    dtype: str
    dims: list[int] | None


def filled_inputs(config: Any) -> dict[str, TritonTensor]:
    """Return the inputs of the network that clients do not send, by name."""
    name_of, tensors = protobuf().DataType.Name, {}
    batching = config.sequence_batching
    for index, tensor in enumerate(batching.control_input):
        for control in tensor.control:
            key = f"sequence_batching.control_input[{index}].name"
            tensors[tensor.name] = TritonTensor(key, control_type(control), [1])
    for index, state in enumerate(batching.state):
        key = f"sequence_batching.state[{index}].input_name"
        tensors[state.input_name] = TritonTensor(key, name_of(state.data_type), list(state.dims))
    for index, entry in enumerate(config.batch_input):
        key = f"batch_input[{index}].target_name"
        tensors |= dict.fromkeys(entry.target_name, TritonTensor(key, name_of(entry.data_type), None))
    return tensors


def kept_outputs(config: Any) -> dict[str, TritonTensor]:
    """Return the outputs of the network that Triton keeps as states and clients do not get, by name."""
    return {
        state.output_name: TritonTensor(
            f"sequence_batching.state[{index}].output_name",
            protobuf().DataType.Name(state.data_type),
            list(state.dims),
        )
        for index, state in enumerate(config.sequence_batching.state)
    }


def has_open_batch(signature: Signature, config: Any, views: Mapping[str, ClientView]) -> bool:
    """Return whether the first dimension of all tensors is the batch, and open."""
    counted = {name for name, tensor in filled_inputs(config).items() if tensor.dims is None}
    return all(
        tensor["shape"][:1] == [-1]
        for tensor in (*signature["inputs"], *signature["outputs"])
        if tensor["name"] not in counted
    )


def add_tensors(config: Any, signature: Signature, fields: Any, views: Mapping[str, ClientView]) -> Iterator[Mistake]:
    """Add the tensors that clients send and get to a ModelConfig whose max_batch_size is set.

    If the batch dimension is open, dims do not contain it. Otherwise they are the full shape.

    Args:
        fields: The ModelConfig with the fields that the spec sets.
        views: How clients see a tensor, by name.

    Yields:
        What contradicts the artifact.
    """
    inputs, outputs = filled_inputs(fields), kept_outputs(fields)
    sources = {name: entry.source_input[0] for entry in fields.batch_output for name in entry.target_name}
    batched = config.max_batch_size > 0
    for kind, tensors, hidden, field in (
        ("input", signature["inputs"], inputs, config.input),
        ("output", signature["outputs"], outputs, config.output),
    ):
        names = [tensor["name"] for tensor in tensors]
        for name, filled in hidden.items():
            if name not in names:
                yield filled.key, f"an {kind} of the network, {', '.join(names)}", with_suggestion(name, names)
        for tensor in tensors:
            if tensor["name"] in hidden:
                yield from _hidden_tensor(tensor, hidden[tensor["name"]], batched)
                continue
            view = views.get(tensor["name"], ClientView())
            source = next((each for each in config.input if each.name == sources.get(tensor["name"])), None)
            dims = tensor["shape"][1 if batched else 0 :]
            if view.ragged:
                if len(tensor["shape"]) != 1:
                    expected = "a network that takes its values in one row, (values), since it is ragged"
                    yield "", expected, f"{tensor['name']} of shape {tensor['shape']}"
                dims = [-1]
            added = field.add(name=tensor["name"], data_type=enum("DataType", DTYPES[tensor["dtype"]]))
            if view.ragged:
                added.allow_ragged_batch = True
                added.dims.extend(view.dims or [-1])
            elif source is not None:  # Triton gives each answer the shape of this input
                added.dims.extend(source.dims)
            else:
                yield from _reshape(added, dims, view, batched)
        if not field:
            yield "", f"an {kind} for clients", f"Triton itself fills or keeps all, {', '.join(names)}"


def _reshape(tensor: Any, dims: list[int], view: ClientView, batched: bool) -> Iterator[Mistake]:
    """Set the dims that clients see, and the reshape to those of the network."""
    # One value per sample: Triton requires a dimension, which this reshape removes.
    seen = view.dims or dims or [1]
    if view.dims and not batched and dims[:1] != [1]:  # clients need not send a batch that is always 1
        seen = [*dims[:1], *view.dims]
    tensor.dims.extend(seen)
    if seen == dims:
        return
    tensor.reshape.shape.extend(dims)
    tensor.reshape.SetInParent()
    if mistake := reshape_mistake(seen, dims):
        expected, found = mistake
        yield "", f"{expected}, for {tensor.name}", found


def reshape_mistake(dims: Sequence[int], shape: Sequence[int]) -> tuple[str, str] | None:
    """Return why Triton cannot reshape what clients send, None if it can: what was expected, and what was found.

    The open dimensions must be as many, and the number of values before, between and after them the same.
    Source: ValidateIOShape in the core's model_config_utils.cc.
    """
    if list(shape) == [] and math.prod(dims) == 1:
        return None
    if _fixed_parts(dims) == _fixed_parts(shape):
        return None
    return f"dims of as many values as {list(shape)}, between the same open dimensions", repr(list(dims))


def _fixed_parts(dims: Sequence[int]) -> list[int]:
    """Return the number of values before, between and after the open dimensions."""
    parts = [1]
    for dim in dims:
        if dim == -1:
            parts.append(1)
        else:
            parts[-1] *= dim
    return parts


def _hidden_tensor(tensor: TensorSignature, filled: TritonTensor, batched: bool) -> Iterator[Mistake]:
    """Yield how a tensor of the network differs from what Triton fills it with."""
    key, _, _ = filled.key.rpartition(".")
    if (dtype := DTYPES[tensor["dtype"]]) != filled.dtype:
        yield key, f"{dtype}, the type of {tensor['name']}", repr(filled.dtype)
    dims = tensor["shape"][1 if batched else 0 :]
    if filled.dims is not None and not (
        len(dims) == len(filled.dims) and all(a in (b, -1) for a, b in zip(dims, filled.dims, strict=True))
    ):
        yield key, f"dims {dims}, those of {tensor['name']}", repr(filled.dims)


def signature_of(config: Any) -> Signature:
    """Return the inputs and outputs of a ModelConfig as a signature, in the shapes that clients see."""
    batch = [-1] if config.max_batch_size else []
    names = {enum("DataType", name): dtype for dtype, name in reversed(DTYPES.items())}
    inputs, outputs = (
        [
            TensorSignature(name=tensor.name, dtype=names[tensor.data_type], shape=[*batch, *tensor.dims])
            for tensor in tensors
        ]
        for tensors in (config.input, config.output)
    )
    return {"inputs": inputs, "outputs": outputs}
