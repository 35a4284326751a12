"""The files of default warm-up requests, for inputs that zeros are not valid for: warmup/<input>.<dims>.bin.

Such are token ids that begin above zero, or a mask of which a network must not see zeros only. The default for all
other inputs is Triton's zero_data, which needs no file.
"""

import math
import os
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from build_tasks.triton.model_config import protobuf

Value = int | float | bool | str

# Formats of the module struct. TYPE_STRING and TYPE_BF16 have none.
PACKED = {
    "BOOL": "?", "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q", "INT8": "b", "INT16": "h", "INT32": "i",
    "INT64": "q", "FP16": "e", "FP32": "f", "FP64": "d",
}  # fmt: skip


def data_file(name: str, dims: Sequence[int]) -> str:
    """Return the name of the file for an input of these dims, relative to the folder warmup/."""
    return f"{re.sub('[:/]', '_', name)}.{'x'.join(map(str, dims))}.bin"


def warm_up_input(
    config: Any, tensor: Any, lengths: Mapping[str, list[int]], smallest_batch: int, filled: Collection[str]
) -> dict[str, Any]:
    """Return one input of a warm-up request.

    Args:
        config: The ModelConfig.
        tensor: Its input.
        lengths: The dims of inputs with open dimensions, without the batch.
        smallest_batch: That of the artifacts.
        filled: The inputs whose values are in a file.
    """
    dims = list(tensor.dims)
    if -1 in dims[0 if config.max_batch_size else 1 :]:
        own = lengths[tensor.name]
        dims[len(dims) - len(own) :] = own
    if not config.max_batch_size and dims[0] == -1:  # clients form the batch
        dims[0] = smallest_batch
    source = {"input_data_file": data_file(tensor.name, dims)} if tensor.name in filled else {"zero_data": True}
    return {"data_type": protobuf().DataType.Name(tensor.data_type), "dims": dims, **source}


def write_files(config: Any, values: Mapping[str, Value], folder: str) -> None:
    """Write the files that the warm-up requests of a ModelConfig name: one value in every place.

    A file holds one sample, which Triton repeats for the batch. Source: GenerateWarmupData in the core's
    backend_model_instance.cc.

    Args:
        config: The ModelConfig.
        values: A valid value of each input that has such files.
        folder: Where the files are written. It is made, also if there are none.
    """
    os.makedirs(folder)
    for sample in config.model_warmup:
        for name, tensor in sample.inputs.items():
            if tensor.WhichOneof("input_data_type") == "input_data_file":
                element = pack_value(values[name], protobuf().DataType.Name(tensor.data_type).removeprefix("TYPE_"))
                with open(f"{folder}/{tensor.input_data_file}", "wb") as file:
                    file.write(element * math.prod(tensor.dims))


def pack_value(value: Value, dtype: str) -> bytes:
    """Return the bytes of one value of a type, "INT64", as Triton stores it."""
    if dtype == "STRING":
        text = str(value).encode()
        return struct.pack("<I", len(text)) + text
    if dtype == "BF16":
        return struct.pack("<f", value)[2:]
    return struct.pack(f"<{PACKED[dtype]}", value)
