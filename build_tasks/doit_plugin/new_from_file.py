"""The specs that `doit new` writes from a file that contains the network.

--from-onnx FILE     a trial build finds out whether the batch of the file can be open
--from-torch FILE    a trial run finds the input size, which TorchScript does not contain
"""

import json
import os
import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from build_tasks.doit_plugin.spec_template import Key, format_spec
from build_tasks.errors import UserError, first_lines
from build_tasks.spec.model import Model
from build_tasks.spec.pictures import colors_of

if TYPE_CHECKING:
    import onnx

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # most networks were trained with these


def onnx_spec(name: str, file: str, scratch: str) -> tuple[str, str]:
    """Return the spec of a model that exists only as ONNX, after a trial build, and the path of the source to copy.

    Args:
        file: An ONNX file, or a folder with an ONNX file and its external weights.
        scratch: A folder for the files of the trial.
    Raises:
        UserError: If it is not ONNX, or has no inputs with a batch.
    """
    from build_tasks.formats import onnx_import
    from build_tasks.spec import loader
    from build_tasks.spec.tensor_checks import UNSUPPORTED

    tables, formats = "", ["onnx", "tensorrt"]
    with onnx_import.report_damage(file):
        graph = onnx_import.read_onnx(file)
        try:
            image: list[int | None] | None = onnx_import.check_image_input(graph, file)
        except UserError:  # it takes something else than one picture
            if not graph.graph.input:
                raise
            tables, image = tensor_tables(graph, file), None
            if any(onnx_import.input_dtype(each) in UNSUPPORTED["tensorrt"] for each in graph.graph.input):
                formats = ["onnx"]
    first = onnx_import.dimensions(graph.graph.input[0])[0]
    for batch in (None, first or 1):
        text = format_spec(f"the ONNX file {os.path.basename(file)}", *onnx_keys(image, batch, formats)) + tables
        model = loader.parse(name, text.encode())
        try:
            try_onnx(model, file, scratch)
        except UserError:
            if batch or first is None:
                raise
        else:
            break
    return text, onnx_import.pack_onnx(file, scratch)


def tensor_tables(graph: "onnx.ModelProto", file: str) -> str:
    """Return [[inputs]] and [dimensions] of an ONNX graph, as TOML.

    Raises:
        UserError: If an input has no dimensions, so that there is no batch.
    """
    from build_tasks.formats.onnx_import import input_dtype

    text, words = "", dict[str, None]()
    for tensor in graph.graph.input:
        dims = tensor.type.tensor_type.shape.dim
        if not dims:
            raise UserError(
                f"{file}: expected inputs with a batch as their first dimension, found {tensor.name} without"
            )
        shape: list[int | str] = []
        for axis, dim in enumerate(list(dims)[1:], start=1):
            word = re.sub(r"\W", "_", dim.dim_param or f"{tensor.name}_{axis}")
            shape.append(dim.dim_value or (word if not word[0].isdigit() else f"d{word}"))
        words |= {word: None for word in shape if isinstance(word, str)}
        dtype = input_dtype(tensor)
        text += f"\n[[inputs]]\nname = {json.dumps(tensor.name)}\ndtype = {json.dumps(dtype)}\n"
        text += f"shape = {json.dumps(shape)}\n"
        if dtype.startswith(("int", "uint")) and dtype != "uint8":
            text += "high = 1  # fill in: the largest value, for token ids that of the vocabulary\n"
    for word in words:
        text += f"\n[dimensions.{word}]  # the file leaves it open: fill in\nmin = 1\nopt = 16\nmax = 64\n"
    return text


def onnx_keys(
    image: list[int | None] | None, batch: int | None, formats: list[str]
) -> tuple[list[Key], Collection[str]]:
    """Return the keys of the spec of an ONNX graph, and the names of keys that make no sense for it.

    Args:
        image: (batch, channels, height, width) of its input; None where the graph leaves one open. None if it takes
            something else than one picture.
        batch: The fixed batch of the spec; None for an open one.
        formats: Those of the spec.
    """
    keys = [
        Key("", "formats", formats, "an ONNX file cannot be converted to TorchScript"),
        Key("weights", "source", "model.onnx", "the network and its weights"),
        *(picture_keys(image) if image else ()),
    ]
    no_picture = () if image else ("ensemble",)
    if batch is None:
        return keys, ("opset", "batch_size", *no_picture)
    keys += [
        Key("onnx", "dynamic_axes", False, "the file's batch is fixed, and its nodes allow no other"),
        Key("onnx", "batch_size", batch),
    ]
    return keys, ("opset", "ensemble", "opt_batch_size")


def picture_keys(image: list[int | None]) -> list[Key]:
    """Return the keys of [input] for the input of an ONNX graph, (batch, channels, height, width)."""
    channels, height, width = (length or other for length, other in zip(image[1:], (3, 224, 224), strict=True))
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ([0.0] * channels, [1.0] * channels)
    comment = "channels, height, width"
    return [
        Key(
            "input",
            "shape",
            [channels, height, width],
            comment if all(image[1:]) else f"{comment}: the file leaves it open",
        ),
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


def torch_spec(name: str, file: str, scratch: str) -> tuple[str, str]:
    """Return the spec of a model that exists only as TorchScript or torch.export, and the path of the source to copy.

    Args:
        name: The name of the model.
        file: The file.
        scratch: A folder for the log of the trial run.
    Raises:
        UserError: If the file contains no network.
    """
    from build_tasks.formats import torch_program
    from build_tasks.runtime import worker

    if not os.path.isfile(file):
        raise UserError(f"--from-torch: expected a file, found {file!r}, which is none")
    torch_program.check_program(file)
    try:
        shape, comment = worker.call(torch_program.find_shape, file, log=f"{scratch}/log")
    except worker.CrashError as error:
        raise UserError(f"{file}: {first_lines(error)}") from error
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if shape[0] == 3 else ([0.0] * shape[0], [1.0] * shape[0])
    suffix = ".pt2" if torch_program.is_exported(file) else ".pt"
    keys = [
        Key("weights", "source", f"model{suffix}", "the network and its weights"),
        Key("input", "shape", shape, f"channels, height, width, {comment}"),
        Key("input", "mean", mean, "not in the file: use the value of the training"),
        Key("input", "std", std, "the same"),
        *sample_keys(shape[0]),
    ]
    return format_spec(f"the file {os.path.basename(file)}", keys), file
