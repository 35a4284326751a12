"""The inputs and outputs that a spec describes, in the one form that all stages read (see tensors.py).

[input]                               one picture ─┐
[[inputs]], [dimensions], [[outputs]] ─────────────┴► Interface
"""

import re
from typing import TYPE_CHECKING

from build_tasks.tensors import (
    HEIGHT,
    INPUT,
    OUTPUT,
    WIDTH,
    InputTensor,
    Interface,
    Normalization,
    OutputTensor,
    Range,
    Shape,
    dims_at,
    served_name,
    tuned_lengths,
)

if TYPE_CHECKING:
    from build_tasks.spec.model import Spec
    from build_tasks.spec.tables import Input
    from build_tasks.spec.tensor_tables import Dimension, TensorInput, TensorOutput

ESTIMATED_PICTURE: Shape = [3, 320, 320]


def interface_of(spec: "Spec") -> Interface:
    """Return the inputs and outputs of a spec. It is plain data, so that it can be part of a fingerprint."""
    normalizes = not spec.inputs and spec.input.format == "uint8_nhwc"
    table = spec.input
    normalization: Normalization = {
        "shape": table.shape,
        "mean": table.mean,
        "std": table.std,
        "scale": table.scale,
    }
    inputs, outputs = inputs_of(spec), [_output(index, output) for index, output in enumerate(spec.outputs)]
    if spec.from_onnx:  # the file is renamed and transposed when it is imported
        inputs = [{**each, "batch_dimension": 0} for each in inputs]
        outputs = [{**output, "key": None, "batch_dimension": 0} for output in outputs]
    return {
        "inputs": inputs,
        "outputs": outputs,
        "dimensions": dimensions_of(spec),
        "softmax": spec.output.softmax,
        "top_k": spec.output.top_k,
        "normalization": normalization if normalizes else None,
    }


def tuned_interface(interface: Interface) -> Interface:
    """Return an interface with the lengths to tune for in the place of words."""
    lengths = tuned_lengths(interface["dimensions"])
    inputs: list[InputTensor] = []
    for each in interface["inputs"]:
        shape: Shape | None = None if each["shape"] is None else [*dims_at(each["shape"], lengths)]
        inputs.append({**each, "shape": shape})
    return {**interface, "inputs": inputs, "dimensions": {}}


def inputs_of(spec: "Spec") -> list[InputTensor]:
    """Return the inputs of a spec."""
    return [_input(index, each) for index, each in enumerate(spec.inputs)] or [picture_input(spec.input)]


def open_inputs(spec: "Spec") -> dict[str, Shape]:
    """Return the shape of each input with open dimensions, without the batch, by the name of the input."""
    shapes = {each["name"]: each["shape"] or [] for each in inputs_of(spec)}
    return {name: shape for name, shape in shapes.items() if any(isinstance(dim, str) for dim in shape)}


def dimensions_of(spec: "Spec") -> dict[str, Range]:
    """Return the range of each open dimension, by its word. Those of [input] are "height" and "width"."""
    table = spec.input
    if not (table.min_size and table.max_size and table.shape):
        return {word: range_of(dimension) for word, dimension in spec.dimensions.items()}
    sizes = zip((HEIGHT, WIDTH), table.min_size, table.shape[1:], table.max_size, strict=True)
    return {word: {"min": least, "opt": best, "max": most} for word, least, best, most in sizes}


def largest_dims(spec: "Spec") -> list[list[int]]:
    """Return the dimensions of each input at its largest; an estimate if only timm knows the size of pictures."""
    lengths = {word: bounds["max"] for word, bounds in dimensions_of(spec).items()}
    shapes = [ESTIMATED_PICTURE if each["shape"] is None else each["shape"] for each in inputs_of(spec)]
    # A word without a range is a mistake, which validation.py reports.
    return [[lengths.get(dim, 1) if isinstance(dim, str) else dim for dim in shape] for shape in shapes]


def range_of(dimension: "Dimension") -> Range:
    """Return the range of an open dimension."""
    return {"min": dimension.min, "opt": dimension.opt or dimension.max, "max": dimension.max}


def picture_input(table: "Input") -> InputTensor:
    """Return the input that [input] describes: one picture."""
    shape: Shape | None = None
    if table.shape is not None:
        channels, *size = table.shape
        dims: Shape = [HEIGHT, WIDTH] if table.min_size else [*size]
        shape = picture_shape(channels, dims, table.format)
    is_bytes = table.format == "uint8_nhwc"
    return {
        "name": INPUT,
        "dtype": "uint8" if is_bytes else "float32",
        "shape": shape,
        "layout": "nhwc" if is_bytes else "nchw",
        "low": None,
        "high": None,
        "values": None,
        "batch_dimension": 0,
    }


def picture_shape(channels: int, size: Shape, input_format: str) -> Shape:
    """Return the shape of a picture in the order of input.format."""
    return [*size, channels] if input_format == "uint8_nhwc" else [channels, *size]


def _input(index: int, table: "TensorInput") -> InputTensor:
    return {
        "name": table.name or f"INPUT__{index}",
        "dtype": table.dtype,
        "shape": [*table.shape],
        "layout": table.layout,
        "low": table.low,
        "high": table.high,
        "values": table.values,
        "batch_dimension": table.batch_dimension,
    }


def _output(index: int, table: "TensorOutput") -> OutputTensor:
    named = table.name or (served_name(table.key) if isinstance(table.key, str) else None)
    return {
        "name": named or OUTPUT.format(index),
        "key": table.key,
        "classes": table.classes,
        "labels": table.labels is not None,
        "batch_dimension": table.batch_dimension,
    }


def client_dims(spec: "Spec") -> dict[str, Shape]:
    """Return the dims that clients see, by the names of the tensors that they see in another shape than the network.

    They concern config.pbtxt and clients only, so that they are no part of the interface of artifacts.
    """
    dims = [
        (each["name"], table.shape if table.ragged else table.dims)
        for each, table in zip(inputs_of(spec), spec.inputs, strict=False)
    ]
    dims += [(_output(index, table)["name"], table.dims) for index, table in enumerate(spec.outputs)]
    return {name: [*shape] for name, shape in dims if shape}


def ragged_inputs(spec: "Spec") -> list[str]:
    """Return the names of the inputs of which requests of several lengths form one batch."""
    return [each["name"] for each, table in zip(inputs_of(spec), spec.inputs, strict=False) if table.ragged]


def label_files(spec: "Spec") -> dict[str, tuple[str, str]]:
    """Return the file in build/<model>/ and the source of the labels of each output, by its name.

    `labels` of the spec itself concerns the first output, whatever its name is: its key is empty.
    """
    files = {"": ("labels.txt", spec.labels)} if spec.labels else {}
    for index, table in enumerate(spec.outputs):
        if table.labels:
            name = _output(index, table)["name"]
            files[name] = f"labels.{re.sub('[:/]', '_', name)}.txt", table.labels
    return files
