"""What an ONNX file says about its batch, and what trial runs find that it leaves open: sizes, the largest token id."""

import functools
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from build_tasks.formats.network_inputs import TRIED_SIDES, FoundInput, largest_index
from build_tasks.formats.onnx_files import onnx_file
from build_tasks.formats.onnx_runtime import onnx_session
from build_tasks.tensors import dims_at

if TYPE_CHECKING:
    import onnx

TEXT_LINES = ((48, 320), (32, 320), (32, 100), (64, 256))  # height, width


def picture_size(path: str, name: str, dims: Sequence[int | None]) -> list[int] | None:
    """Return the first usual [channels, height, width] with which an ONNX graph of one picture runs; None without one.

    Args:
        path: The file.
        name: Its input.
        dims: (batch, channels, height, width) of its input; None where the graph leaves one open.
    """
    import numpy as np

    run = onnx_session(path)
    batch, *declared = dims
    for size in (*((side, side) for side in TRIED_SIDES), *TEXT_LINES):
        for channels in (3, 1):
            shape = [length or other for length, other in zip(declared, (channels, *size), strict=True)]
            try:
                run({name: np.zeros([batch or 1, *shape], np.float32)})
            except Exception:  # of ONNX Runtime, for a size that the graph does not take
                continue
            return shape
    return None


def largest_ids(path: str, inputs: Sequence[FoundInput], batch: int) -> dict[str, int]:
    """Return the largest id of the inputs of an ONNX graph that are indices into one of its tables, by name."""
    import numpy as np
    import onnx

    graph = onnx.load(onnx_file(path), load_external_data=False).graph
    sizes = [int(tensor.dims[0]) for tensor in graph.initializer if len(tensor.dims) == 2]
    words = dict.fromkeys(itertools.chain.from_iterable(each.shape or [] for each in inputs), 16)
    lengths = {word: length for word, length in words.items() if isinstance(word, str)}
    zeros = {}
    for each in inputs:
        dims = dims_at(each.shape or [], lengths)
        dims.insert(each.batch_dimension, batch)
        zeros[each.name] = np.zeros(dims, each.dtype)
    run = onnx_session(path)

    def runs_with(name: str, value: int) -> bool:
        try:
            run({**zeros, name: np.full_like(zeros[name], value)})
        except Exception:  # of ONNX Runtime, for an index beyond the table
            return False
        return True

    found = {}
    for each in inputs:
        if each.dtype in ("int32", "int64") and (high := largest_index(functools.partial(runs_with, each.name), sizes)):
            found[each.name] = high
    return found


def batch_of(graph: "onnx.ModelProto") -> tuple[int, str]:
    """Return the fixed batch of an ONNX graph, 0 if it is open, and the word of an open one, "" if it has none."""
    inputs = [tensor.type.tensor_type.shape.dim for tensor in graph.graph.input if tensor.type.tensor_type.shape.dim]
    words = [dim.dim_param for dims in inputs for dim in dims if re.fullmatch(r"(?i)n|.*batch.*", dim.dim_param)]
    return (inputs[0][0].dim_value, words[0] if words else inputs[0][0].dim_param) if inputs else (0, "")


def batch_place(tensor: "onnx.ValueInfoProto", word: str) -> int:
    """Return the dimension of the batch in an input or output: the one with the word of the batch, or the first one."""
    words = [dim.dim_param for dim in tensor.type.tensor_type.shape.dim]
    return words.index(word) if word and word in words else 0
