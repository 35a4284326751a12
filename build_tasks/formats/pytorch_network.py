"""The network that a spec describes, and the preprocessing that belongs to it."""

import glob
import os
import sys
import traceback
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError, first_lines
from build_tasks.formats.onnx_files import fixed_batch
from build_tasks.formats.onnx_runtime import ONNX_MODULES, onnx_session
from build_tasks.paths import MODELS
from build_tasks.spec.model import Model, table_settings
from build_tasks.tensors import layout_dims
from build_tasks.verification.tolerance import float_outputs, max_relative_error, perturb_one_ulp

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

Settings = dict[str, Any]

NORMALISING = ("shape", "mean", "std")  # of [input]; the shape for the number of channels

NETWORK_MODULES = ("build_tasks.formats.pytorch_network", "build_tasks.tensors", "build_tasks.verification.tolerance")


def settings_of(model: Model) -> Settings:
    """What decides the network, for the fingerprint of every stage that makes it."""
    return {"model": model.name, "architecture": table_settings(model.spec.architecture)}


def input_settings_of(model: Model) -> Settings:
    """What decides the preprocessing, besides the network."""
    return {
        key: value for key, value in table_settings(model.spec.input).items() if key not in ("min_size", "max_size")
    }


def interface_of(model: Model) -> Settings:
    """What clients send and get, where that is not the network's own: for the fingerprint of what makes artifacts."""
    spec = model.spec
    normalised = spec.input.format != "fp32_nchw"
    return {
        "format": spec.input.format,
        **table_settings(spec.output),
        **({key: getattr(spec.input, key) for key in NORMALISING} if normalised else {}),
    }


def shapes_to_check(shape: tuple[int, int, int], sizes: list[list[int]] | None) -> list[tuple[int, int, int]]:
    """The inputs that a network with open height and width must take: its own, the smallest, the largest."""
    return [shape, *((shape[0], height, width) for height, width in sizes or ())]


def spatial_axes(input_format: str) -> tuple[int, int]:
    """Which dimensions of an input they are."""
    return (1, 2) if input_format == "uint8_nhwc" else (2, 3)


def size_dependent_axes(
    module: Any, shape: tuple[int, int, int], sizes: list[list[int]] | None, input_format: str
) -> list[list[int]]:
    """Which dimensions of each output, besides the batch, follow the size of the input."""
    answers = [forward(module, example_input(other, 1, input_format)) for other in shapes_to_check(shape, sizes)]
    return [
        [axis for axis in range(1, same[0].ndim) if len({answer.shape[axis] for answer in same}) > 1]
        for same in zip(*answers, strict=True)
    ]


def source_modules(model: Model) -> tuple[str, ...]:
    """The project's modules that make the network, for the fingerprint of every stage that uses it."""
    return (*NETWORK_MODULES, *(ONNX_MODULES if model.spec.from_onnx else ()))


def user_source_files(model: Model) -> tuple[str, ...]:
    """The user's files that make the network: all Python files of the model, but a converter of its own."""
    network = model.spec.architecture.network
    if network is None:
        return ()
    converter = model.source((model.spec.weights.converter or "").partition(":")[0])
    return tuple(sorted({*python_files(model)} - {converter} | {model.source(network.partition(":")[0])}))


def python_files(model: Model) -> list[str]:
    return sorted(map(os.path.normpath, glob.glob(f"{MODELS}/{model.name}/**/*.py", recursive=True)))


def create_network(settings: Settings, weights: str | None = None, exportable: bool = False) -> "torch.nn.Module":
    """The network in inference mode, with the weights of a safetensors file or as the architecture initialises it.

    Of a spec without an architecture it is the ONNX file of weights; without that, a network that cannot be run.
    exportable: timm's variants of layers that old opsets can express.
    """
    import timm
    from safetensors.torch import load_file

    architecture = settings["architecture"]
    if architecture["timm"] is None and architecture["network"] is None:
        return onnx_module(weights)
    try:
        if architecture["timm"] is not None:
            module = timm.create_model(architecture["timm"], exportable=exportable, **architecture["arguments"])
        else:
            build = user_function(settings["model"], architecture["network"])
            module = build(**architecture["arguments"])
    except (RuntimeError, TypeError) as error:  # timm: unknown model; Python: unknown argument
        raise UserError(f"{MODELS}/{settings['model']}/model.toml: architecture: {error}") from error
    if weights is not None:
        module.load_state_dict(load_file(weights))
    return module.eval().requires_grad_(False)


def onnx_module(path: str | None) -> "torch.nn.Module":
    """An ONNX file in the place of a network: ONNX Runtime answers, on the CPU, in fp32.

    Where its batch is fixed, batches of any size are cut to it, and the last is filled with repeats.
    """
    import numpy as np
    import torch

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.run = onnx_session(path) if path else None
            self.batch = fixed_batch(path) if path else None

        def forward(self, batch: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
            assert self.run is not None
            parts = []
            for part in batch.split(self.batch or len(batch)):
                filled = np.resize(part.numpy(), (self.batch or len(part), *part.shape[1:]))
                answers = [torch.from_numpy(answer) for answer in self.run(filled)]
                parts.append([_of_images(answer, len(filled))[: len(part)] for answer in answers])
            return tuple(torch.cat(answers) for answers in zip(*parts, strict=True))

    return Graph().eval()


def _of_images(answer: "torch.Tensor", batch: int) -> "torch.Tensor":
    if answer.ndim == 0 or answer.shape[0] != batch:
        raise UserError(
            f"an output has shape {list(answer.shape)} for a batch of {batch}; the batch must be its first dimension"
        )
    return answer


def wrap_for_serving(module: "torch.nn.Module", interface: Settings) -> "torch.nn.Module":
    """The network with what clients want around it, as hooks: its layers keep their names in every format.

    uint8 (batch, height, width, channels) is normalised on the way in; float32 (batch, channels, height, width) still
    passes as it is. Out come probabilities, or the best values and their classes. UserError where the network's
    answer is not one output of (batch, classes).
    """
    if interface["format"] == "uint8_nhwc":
        module.register_forward_pre_hook(lambda _, inputs: (normalize_input(module, inputs[0], interface),))
    if interface["softmax"] or interface["top_k"]:
        module.register_forward_hook(lambda _, inputs, answer: top_k_outputs(answer, interface))
    return module


def normalize_input(module: "torch.nn.Module", batch: "torch.Tensor", interface: Settings) -> "torch.Tensor":
    """uint8 (batch, height, width, channels) as the network wants it; what is normalised already as it is.

    The difference is taken first: in fp16 it is exact but for the mean's own rounding.
    """
    import torch

    if batch.dtype != torch.uint8:
        return batch
    config = data_config(module, {key: interface[key] for key in NORMALISING})
    mean, std = (torch.tensor(config[key], dtype=torch.float64).reshape(-1, 1, 1) * 255 for key in ("mean", "std"))
    # Cast before all else: TensorRT takes bytes for nothing but that.
    return (batch.float().permute(0, 3, 1, 2) - mean.float()) * (1 / std).float()


def top_k_outputs(answer: Any, interface: Settings) -> Any:
    """Probabilities, or the best `top_k` values and their classes, of what the network answers."""
    import torch

    if not isinstance(answer, torch.Tensor) or answer.ndim != 2:
        found = f"shape {list(answer.shape)}" if isinstance(answer, torch.Tensor) else type(answer).__name__
        raise UserError(f"output: softmax and top_k need one output of (batch, classes), and the network's is {found}")
    answer = answer.softmax(dim=1) if interface["softmax"] else answer
    if interface["top_k"] is None:
        return answer
    if interface["top_k"] > answer.shape[1]:
        raise UserError(f"output.top_k: {interface['top_k']} of {answer.shape[1]} classes")
    return tuple(answer.topk(interface["top_k"], dim=1))


def user_function(model: str, name: str) -> Callable[..., Any]:
    """The function `file.py:function` of a model's folder."""
    file, _, function = name.partition(":")
    path = f"{MODELS}/{model}/{file}"
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist")
    module = types.ModuleType(f"models_{model}_{file.removesuffix('.py')}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look their module up
    # It is not imported, and what it imports leaves no bytecode: Python's cache of that trusts mtime and size.
    sys.dont_write_bytecode = True
    try:
        with open(path, "rb") as source:
            exec(compile(source.read(), path, "exec"), module.__dict__)
    except Exception as error:
        raise user_error(path, error) from error
    if not callable(getattr(module, function, None)):
        raise UserError(f"{path}: there is no function {function}")
    found: Callable[..., Any] = getattr(module, function)
    return found


def user_error(path: str, error: Exception) -> UserError:
    """What went wrong in a file of the user's, with the line; the traceback goes to the log."""
    traceback.print_exc()
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    where = f"{path}, line {line}" if line else path
    return UserError(f"{where}: {type(error).__name__}: {first_lines(error)}")


def data_config(module: "torch.nn.Module", overrides: Settings) -> dict[str, Any]:
    """timm's data config of the network under the spec's overrides: input_size, mean, std, interpolation, crop."""
    from timm.data import resolve_data_config

    given = {key: value for key, value in overrides.items() if value is not None and key != "format"}
    if "shape" in given:
        given["input_size"] = tuple(given.pop("shape"))
    config: dict[str, Any] = {**resolve_data_config(model=module), **given}
    channels = config["input_size"][0]
    for key in ("mean", "std"):
        if len(config[key]) not in (1, channels):
            raise UserError(f"input.{key}: expected {channels} values, one for each channel, found {config[key]}")
    return config


def input_shape(module: "torch.nn.Module", override: list[int] | None) -> tuple[int, int, int]:
    """(channels, height, width) of one input."""
    channels, height, width = data_config(module, {"shape": override})["input_size"]
    return channels, height, width


def transform(config: dict[str, Any], input_format: str) -> "Callable[[Image], torch.Tensor]":
    """timm's preprocessing under a data config, from a PIL image to what clients send (without the batch)."""
    preprocess = timm_transform(config, input_format)
    return (lambda image: preprocess(image).permute(1, 2, 0)) if input_format == "uint8_nhwc" else preprocess


def timm_transform(config: dict[str, Any], input_format: str) -> Any:
    """The same as timm has it, whose bytes are (channels, height, width)."""
    from timm.data import create_transform

    return create_transform(**config, is_training=False, normalize=input_format != "uint8_nhwc")


def forward(module: Any, batch: "torch.Tensor") -> "list[torch.Tensor]":
    """The outputs of the network, in order. UserError where they are not tensors with the batch in front."""
    import torch

    with torch.inference_mode():
        outputs = module(batch)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    if not isinstance(outputs, tuple | list) or not all(isinstance(output, torch.Tensor) for output in outputs):
        raise UserError(
            f"the network answers with {type(outputs).__name__}; Triton needs one tensor, or a tuple of them"
        )
    for index, output in enumerate(outputs):
        if output.dtype == torch.bfloat16:
            raise UserError(f"output {index} is bfloat16, which Triton's clients and NumPy do not have; cast it")
        if output.ndim == 0 or output.shape[0] != len(batch):
            raise UserError(
                f"output {index} has shape {list(output.shape)} for a batch of {len(batch)}; "
                "the batch must be its first dimension"
            )
    return list(outputs)


def sensitivity(module: Any, shape: tuple[int, int, int], batch: int) -> float:
    """How far the outputs move, relative to their size, when every value of an example moves by an ulp."""
    import torch

    inputs = example_input(shape, batch)
    moved = torch.from_numpy(perturb_one_ulp(inputs.numpy()))
    outputs, others = ([answer.numpy() for answer in forward(module, values)] for values in (inputs, moved))
    return max_relative_error(*(float_outputs(answers) for answers in (others, outputs)))


def example_input(
    shape: tuple[int, int, int], batch: int, input_format: str = "fp32_nchw", seed: int = 0
) -> "torch.Tensor":
    """A reproducible input: standard normal values, or bytes. shape: (channels, height, width)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    if input_format == "uint8_nhwc":
        return torch.randint(0, 256, (batch, *layout_dims(shape, input_format)), generator=generator, dtype=torch.uint8)
    return torch.randn(batch, *shape, generator=generator)
