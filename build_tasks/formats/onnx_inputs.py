"""What an ONNX file says about its batch, and what trial runs find that it leaves open: sizes, the largest token id."""

import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from build_tasks.formats.input_trials import TRIED_SIDES, FoundInput, largest_index
from build_tasks.formats.onnx_files import onnx_file
from build_tasks.formats.onnx_runtime import onnx_session

if TYPE_CHECKING:
    import onnx

    from build_tasks.tensors import Feed

MAX_WORDS = 5  # that may share lengths: 52 runs of the graph at most
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


def words_of(inputs: Iterable[FoundInput]) -> list[str]:
    """Return the words of the open dimensions of inputs, each once."""
    words = (dim for each in inputs for dim in each.shape or [] if isinstance(dim, str))
    return [*dict.fromkeys(words)]


def join_words(path: str, inputs: Sequence[FoundInput], words: Sequence[str], batch: int) -> list[FoundInput]:
    """Return the inputs of an ONNX graph with one word for dimensions that must have one length.

    Files often leave dimensions open without names, or with a name for each. The graph runs with a length for each
    word, then with one length for two words, and so on. If it runs with none of them, all words stay as they are.

    Args:
        path: The file.
        inputs: The inputs.
        words: The words of their shapes.
        batch: The number of samples.
    """
    run = onnx_session(path)
    # For each word the index of an earlier one whose length it has, or its own; the fewest words that share first.
    places = itertools.product(*(range(index + 1) for index in range(min(len(words), MAX_WORDS))))
    shared = [place for place in places if all(place[index] == index for index in place)]
    for place in sorted(shared, key=lambda place: -len({*place})):
        same = {word: words[index] for word, index in zip(words, place, strict=False)}
        lengths = {word: 16 + 3 * words.index(same.get(word, word)) for word in words}
        try:
            run(_zeros(inputs, batch, lengths))
        except Exception:  # of ONNX Runtime, for lengths that do not fit each other
            continue
        return [each._replace(shape=[same.get(str(dim), dim) for dim in each.shape or []]) for each in inputs]
    return [*inputs]


def _zeros(inputs: Sequence[FoundInput], batch: int, lengths: Mapping[str, int]) -> "Feed":
    """Return a batch of zeros of every input; of empty texts for strings."""
    import numpy as np

    feed = {}
    for each in inputs:
        dims = [lengths[dim] if isinstance(dim, str) else dim for dim in each.shape or []]
        dims.insert(each.batch_dimension, batch)
        feed[each.name] = np.full(dims, "", object) if each.dtype == "string" else np.zeros(dims, each.dtype)
    return feed


def largest_ids(path: str, inputs: Sequence[FoundInput], batch: int) -> dict[str, int]:
    """Return the largest id of the inputs of an ONNX graph that are indices into one of its tables, by name."""
    import numpy as np
    import onnx

    graph = onnx.load(onnx_file(path), load_external_data=False).graph
    sizes = [int(tensor.dims[0]) for tensor in graph.initializer if len(tensor.dims) == 2]
    zeros = _zeros(inputs, batch, dict.fromkeys(words_of(inputs), 16))
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


def holds_numbers(tensor: "onnx.ValueInfoProto") -> bool:
    """Return whether an input or output is a tensor of numbers: no strings, and no sequence or map, as ZipMap's."""
    import onnx

    kind = tensor.type.WhichOneof("value")
    return kind is None or (kind == "tensor_type" and tensor.type.tensor_type.elem_type != onnx.TensorProto.STRING)
