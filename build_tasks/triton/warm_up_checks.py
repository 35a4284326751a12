"""Checks of ModelConfig's model_warmup: requests that Triton skips, or that prevent the model from being loaded.

Sources: GenerateWarmupData in the core's backend_model_instance.cc, and trials with the server of release 24.10.
"""

import math
import os
from collections.abc import Iterator
from typing import Any

from build_tasks.errors import first_lines
from build_tasks.tensors import IMAGE
from build_tasks.triton.model_config import Mistake, protobuf

# Bytes of an element. TYPE_STRING has none: each element is preceded by its length.
ELEMENT_BYTES = {
    "BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8,
    "FP16": 2, "FP32": 4, "FP64": 8, "BF16": 2,
}  # fmt: skip


def mistakes(config: Any) -> Iterator[Mistake]:
    """Yield samples that Triton skips, or that prevent the model from being loaded.

    Where the ModelConfig has its inputs, the tensors of the samples are compared with them.
    """
    largest = config.max_batch_size
    names = [sample.name for sample in config.model_warmup]
    inputs = {tensor.name: tensor for tensor in config.input}
    batching = config.sequence_batching  # a warm-up request bypasses it, and holds what it would fill in
    needed = [*inputs, *(each.name for each in batching.control_input), *(each.input_name for each in batching.state)]
    for index, sample in enumerate(config.model_warmup):
        key = f"model_warmup[{index}]"
        if names.index(sample.name) != index:
            yield f"{key}.name", "a name that no sample before has", repr(sample.name)
        if not 1 <= sample.batch_size <= max(largest, 1):
            expected = f"1 to max_batch_size, {largest}" if largest else "1, since dims contain the fixed batch"
            yield f"{key}.batch_size", expected, repr(sample.batch_size)
        for name, tensor in sorted(sample.inputs.items()):
            if tensor.WhichOneof("input_data_type") is None:
                yield f"{key}.inputs.{name}", "one of zero_data, random_data, input_data_file", "none of them"
            if min(tensor.dims, default=1) < 1:
                yield f"{key}.inputs.{name}.dims", "dims >= 1", repr(list(tensor.dims))
        if inputs and sorted(sample.inputs) != sorted(needed):
            yield f"{key}.inputs", f"the model's inputs, {', '.join(needed)}", repr(", ".join(sorted(sample.inputs)))
        elif inputs:
            for name, tensor in sorted(sample.inputs.items()):
                if name in inputs:
                    yield from _warm_up_tensor(f"{key}.inputs.{name}", tensor, inputs[name])


def _warm_up_tensor(key: str, tensor: Any, model_input: Any) -> Iterator[Mistake]:
    name_of = protobuf().DataType.Name
    if tensor.data_type != model_input.data_type:
        yield f"{key}.data_type", name_of(model_input.data_type), name_of(tensor.data_type)
    dims, model_dims = list(tensor.dims), list(model_input.dims)
    if len(dims) != len(model_dims) or not all(
        a == b or (b == -1 and a > 0) for a, b in zip(dims, model_dims, strict=True)
    ):
        yield f"{key}.dims", f"{model_dims}, the dims of the model", repr(dims)


def file_mistakes(config: Any, folder: str, of_pictures: bool) -> Iterator[Mistake]:
    """Yield files of warm-up requests that are missing, of another size, or no pictures.

    Args:
        folder: The folder that holds the files.
        of_pictures: Whether the model decodes pictures, so that a request without a picture fails.
    """
    for index, sample in enumerate(config.model_warmup):
        for name, tensor in sorted(sample.inputs.items()):
            key = f"model_warmup[{index}].inputs.{name}"
            kind = tensor.WhichOneof("input_data_type")
            if kind == "input_data_file":
                path = f"{folder}/{tensor.input_data_file}"
                if not os.path.isfile(path):
                    yield f"{key}.input_data_file", f"a file in {folder}/", repr(tensor.input_data_file)
                elif mistake := _file_mistake(path, tensor, of_pictures and name == IMAGE):
                    yield f"{key}.input_data_file", *mistake
            elif of_pictures and kind is not None:
                yield f"{key}.{kind}", "input_data_file, since the model decodes pictures", "no picture"


def _file_mistake(path: str, tensor: Any, is_picture: bool) -> tuple[str, str] | None:
    """Return what is expected of the file of a warm-up request, and what was found. None if it fits."""
    dtype = protobuf().DataType.Name(tensor.data_type).removeprefix("TYPE_")
    count = math.prod(tensor.dims)
    if count < 1:
        return None
    if (needed := byte_size(tensor)) is not None:
        size = os.path.getsize(path)
        return (f"{needed} bytes, as dims and data_type say", f"{size} bytes in {path}") if size != needed else None
    if dtype != "STRING":
        return None
    with open(path, "rb") as file:
        elements = _split(file.read())
    if elements is None or len(elements) != count:
        found = f"{path}, which does not consist of them" if elements is None else f"{len(elements)} in {path}"
        return f"{count} elements, each preceded by its length in 4 bytes, little-endian", found
    for element in elements if is_picture else ():
        if reason := _decoding_error(element):
            return "pictures", f"{path}: {reason}"
    return None


def byte_size(tensor: Any) -> int | None:
    """Return the bytes of a tensor with data_type and fixed dims, None if its elements have no fixed size."""
    dtype = protobuf().DataType.Name(tensor.data_type).removeprefix("TYPE_")
    return math.prod(tensor.dims) * ELEMENT_BYTES[dtype] if dtype in ELEMENT_BYTES else None


def _split(content: bytes) -> list[bytes] | None:
    """Return the elements of a file of strings, None if it is none."""
    elements, position = [], 0
    while position < len(content):
        end = position + 4 + int.from_bytes(content[position : position + 4], "little")
        if end > len(content) or position + 4 > len(content):
            return None
        elements.append(content[position + 4 : end])
        position = end
    return elements


def _decoding_error(content: bytes) -> str | None:
    """Return why a picture cannot be decoded, None if it can."""
    import io

    from PIL import Image  # only for models that warm up with pictures

    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except Exception as error:  # a broken file may raise errors of Pillow, zlib or struct
        return first_lines(error)
    return None
