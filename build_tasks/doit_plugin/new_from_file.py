"""The spec that `doit new --from-onnx FILE` writes: a trial build finds out whether the batch of the file can be open.

new_from_torch.py, for files and networks of PyTorch, uses the same tables.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

import msgspec

from build_tasks.doit_plugin.spec_template import Key, format_spec, format_value
from build_tasks.errors import UserError, first_lines
from build_tasks.spec.model import Model
from build_tasks.spec.pictures import colors_of
from build_tasks.tensors import OUTPUT, Shape

if TYPE_CHECKING:
    import onnx

    from build_tasks.formats.input_trials import FoundInput

T = TypeVar("T")
SAMPLES = "samples"  # the word of sound, which is longer than text
LARGEST = "fill in: the largest length that is served"
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # most networks were trained with these


def onnx_spec(name: str, file: str, scratch: str) -> tuple[str, str]:
    """Return the spec of a model that exists only as ONNX, after a trial build, and the path of the source to copy.

    Args:
        file: An ONNX file, or a folder with an ONNX file and its external weights.
        scratch: A folder for the files of the trial.
    Raises:
        UserError: If it is not ONNX, or has no inputs with a batch.
    """
    from build_tasks.formats import onnx_files, onnx_import, onnx_inputs
    from build_tasks.spec import loader
    from build_tasks.spec.tensor_checks import UNSUPPORTED

    tables, formats, size_comment = "", ["onnx", "tensorrt"], "channels, height, width"
    with onnx_import.report_damage(file):
        graph = onnx_import.read_onnx(file)
        try:
            image: list[int | None] | None = onnx_import.check_image_input(graph, file)
            tables = output_tables(graph)
        except UserError:  # it takes something else than one picture
            if not graph.graph.input:
                raise
            tables, image = tensor_tables(graph, file, scratch), None
            if any(onnx_import.input_dtype(each) in UNSUPPORTED["tensorrt"] for each in graph.graph.input):
                formats = ["onnx"]
        formats = ["onnx"] if onnx_files.foreign_node(graph) else formats
    first = onnx_import.dimensions(graph.graph.input[0])[0]
    if image and not all(image[1:]):
        name_of_input = graph.graph.input[0].name
        size = call(onnx_inputs.picture_size, file, name_of_input, image, log=f"{scratch}/log")
        image = [first, *(size or image[1:])]
        size_comment += ": the file leaves it open, found by trial" if size else ": the file leaves it open"
    scale = onnx_files.shared_scale(graph)
    for batch in (first or 1,) if scale else (None, first or 1):
        text = (
            format_spec(
                f"the ONNX file {os.path.basename(file)}", *onnx_keys(image, size_comment, batch, formats, scale)
            )
            + tables
        )
        model = loader.parse(name, text.encode())
        try:
            try_onnx(model, file, scratch)
        except UserError:
            if batch or first is None:
                if LARGEST not in tables:
                    raise
                text = text.replace(LARGEST, f"{LARGEST}; it does not run at these lengths")  # only the user knows them
                break
        else:
            break
    return text, onnx_import.pack_onnx(file, scratch)


def tensor_tables(graph: "onnx.ModelProto", file: str, scratch: str) -> str:
    """Return [[inputs]] and [dimensions] of an ONNX graph, as TOML.

    Raises:
        UserError: If an input has no dimensions, so that there is no batch.
    """
    from build_tasks.formats import input_trials, onnx_inputs
    from build_tasks.formats.onnx_import import input_dtype, is_scalar, without_batch

    inputs = list[input_trials.FoundInput]()
    batch, word_of_batch = onnx_inputs.batch_of(graph)
    for tensor in graph.graph.input:
        dims = tensor.type.tensor_type.shape.dim
        if is_scalar(tensor):
            raise UserError(f"{file}: {without_batch(tensor.name)}")
        if not dims:
            raise UserError(
                f"{file}: expected inputs with a batch as their first dimension, found {tensor.name} without"
            )
        shape: Shape = []
        place = onnx_inputs.batch_place(tensor, word_of_batch)
        for axis, dim in enumerate(dims):
            if axis == place:
                continue
            word = re.sub(r"\W", "_", dim.dim_param or f"{tensor.name}_{axis}")
            shape.append(dim.dim_value or (word if not word[0].isdigit() else f"d{word}"))
        found = input_trials.FoundInput(tensor.name, input_dtype(tensor), shape, batch_dimension=place)
        inputs.append(found)
    if len(words := onnx_inputs.words_of(inputs)) > 1:
        inputs = call(onnx_inputs.join_words, file, inputs, words, batch or 2, log=f"{scratch}/log")
    if any(each.dtype in ("int32", "int64") for each in inputs):
        largest = call(onnx_inputs.largest_ids, file, inputs, batch or 2, log=f"{scratch}/log")
        inputs = [each._replace(high=largest.get(each.name)) for each in inputs]
    if not all(map(is_tensor_name, (each.name for each in inputs))):  # other names for all, which go by the order
        inputs = [each._replace(name=f"INPUT__{index}") for index, each in enumerate(inputs)]
    return input_tables(inputs) + output_tables(graph)


def output_tables(graph: "onnx.ModelProto") -> str:
    """Return [[outputs]] of an ONNX graph as TOML, if some hold no numbers, or have the batch in another dimension."""
    from build_tasks.formats import onnx_inputs

    _, word_of_batch = onnx_inputs.batch_of(graph)
    numbers = [tensor for tensor in graph.graph.output if onnx_inputs.holds_numbers(tensor)]
    places = {tensor.name: onnx_inputs.batch_place(tensor, word_of_batch) for tensor in numbers}
    needed = any(places.values()) or len(numbers) < len(graph.graph.output)
    return format_outputs(places.items()) if needed else ""


def format_outputs(places: Iterable[tuple[str | int | None, int]]) -> str:
    """Return [[outputs]] as TOML.

    Args:
        places: The name of each output, or its index, None for the only one; and the dimension of its batch.
    """
    text = ""
    for index, (name, place) in enumerate(places):
        keys: dict[str, str | int] = {}
        if isinstance(name, str) and not is_tensor_name(name):
            keys = {"name": OUTPUT.format(index), "key": name}
        elif name is not None:
            keys = {"key" if isinstance(name, int) else "name": name}
        keys |= {"batch_dimension": place} if place else {}
        text += "\n[[outputs]]\n" + "".join(f"{key} = {format_value(value)}\n" for key, value in keys.items())
    return text


def is_tensor_name(name: str) -> bool:
    """Return whether a spec can have a name of a file: not "191", which exporters give to a tensor without one."""
    from build_tasks.spec.tensor_tables import TensorName

    try:
        msgspec.convert(name, TensorName)
    except msgspec.ValidationError:
        return False
    return True


def call(function: Callable[..., T], file: str, *arguments: object, log: str) -> T:
    """Return what a function finds in a file, in a process of its own: a file may run code of the user.

    Raises:
        UserError: If it raises an error.
    """
    from build_tasks.runtime import worker

    try:
        found: T = worker.call(function, file, *arguments, log=log)
    except worker.CrashError as error:
        raise UserError(f"{file}: {first_lines(error)}") from error
    return found


def input_tables(inputs: "list[FoundInput]", dimensions: Mapping[str, tuple[int, int]] = MappingProxyType({})) -> str:
    """Return [[inputs]] and [dimensions] as TOML, with comments where a value is to be filled in.

    Args:
        inputs: The inputs.
        dimensions: The smallest and the largest length of open dimensions, where they are known; 0 if there is no
            largest one.
    """
    text, words = "", dict[str, None]()
    for each in inputs:
        reason = f": {each.reason}" if each.reason else ""
        shape = (
            f"shape = [1]  # fill in: the dimensions of {each.name} without the batch; none that was tried fits{reason}"
        )
        if each.shape is not None:
            shape = f"shape = {format_value(each.shape)}"
            words |= {dim: None for dim in each.shape if isinstance(dim, str)}
        text += f"\n[[inputs]]\nname = {format_value(each.name)}\ndtype = {format_value(each.dtype)}\n{shape}\n"
        if each.batch_dimension:
            text += f"batch_dimension = {each.batch_dimension}\n"
        if each.is_mask:
            text += "values = [1]  # a mask of ones\n"
        elif each.high is not None:
            text += f"high = {each.high}  # the last row of a table in the network\n"
        elif each.dtype.startswith(("int", "uint")) and each.dtype != "uint8":
            text += "high = 1  # fill in: the largest value, for token ids that of the vocabulary\n"
    for word in words:
        smallest, largest = dimensions.get(word, (1, 0))
        most = max(smallest, largest or (64000 if word == SAMPLES else 64))
        unknown = "" if largest else f"  # {LARGEST}"
        text += f"\n[dimensions.{word}]\nmin = {smallest}\nopt = {max(smallest, most // 4)}\nmax = {most}{unknown}\n"
    return text


def onnx_keys(
    image: list[int | None] | None, size_comment: str, batch: int | None, formats: list[str], scale: str | None
) -> tuple[list[Key], Collection[str]]:
    """Return the keys of the spec of an ONNX graph, and the names of keys that make no sense for it.

    Args:
        image: (batch, channels, height, width) of its input; None where the graph leaves one open. None if it takes
            something else than one picture.
        size_comment: How the size is known.
        batch: The fixed batch of the spec; None for an open one.
        formats: Those of the spec.
        scale: The operator that takes one scale for a whole batch.
    """
    keys = [
        Key("", "formats", formats, "an ONNX file cannot be converted to TorchScript"),
        Key("weights", "source", "model.onnx", "the network and its weights"),
        *(picture_keys(image, size_comment) if image else ()),
    ]
    no_picture = () if image else ("ensemble",)
    if batch is None:
        return keys, ("opset", "batch_size", *no_picture)
    fixed = "the file's batch is fixed, and its nodes allow no other"
    if scale:
        fixed = f"{scale} takes one scale for a whole batch"
    keys += [
        Key("onnx", "dynamic_axes", False, fixed),
        Key("onnx", "batch_size", batch),
    ]
    return keys, ("opset", "ensemble", "opt_batch_size")


def picture_keys(image: list[int | None], size_comment: str) -> list[Key]:
    """Return the keys of [input] for the input of an ONNX graph, (batch, channels, height, width)."""
    channels, height, width = (length or other for length, other in zip(image[1:], (3, 224, 224), strict=True))
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ([0.0] * channels, [1.0] * channels)
    return [
        Key("input", "shape", [channels, height, width], size_comment),
        Key("input", "mean", mean, "not in the ONNX file: use the value of the training"),
        Key("input", "std", std, "the same"),
        *sample_keys(channels),
    ]


def sample_keys(channels: int) -> list[Key]:
    """Return the key of the samples, if the photographs that ship cannot give a network this number of channels."""
    comment = f"fill in: put preprocessed samples of {channels} channels into this file"
    return [] if colors_of(None, None, channels) else [Key("accuracy", "samples", "samples.npz", comment)]


def try_onnx(model: Model, file: str, scratch: str) -> None:
    """Build model.onnx of a model that does not exist yet into a scratch folder.

    Raises:
        UserError: If that fails.
    """
    from build_tasks.runtime import worker
    from build_tasks.stages import onnx, weights

    for stage, inputs, names in (
        (weights.stage(model), {"source": file}, ("weights",)),
        (onnx.stage(model), {"weights": f"{scratch}/weights.onnx"}, ("model", "signature", "export", "tools")),
    ):
        outputs = {name: f"{scratch}/{os.path.basename(stage.outputs[name])}" for name in names}
        try:
            worker.call(stage.build, inputs, outputs, stage.settings, log=f"{scratch}/log")
        except worker.CrashError as error:
            raise UserError(f"{file}: {first_lines(error)}") from error
