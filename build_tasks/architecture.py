"""The network that a spec describes, and the preprocessing that belongs to it."""

import glob
import os
import sys
import traceback
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from build_tasks.compare import disagreement, moved_by_an_ulp
from build_tasks.errors import UserError, first_lines
from build_tasks.spec import MODELS, Model, settings

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

Settings = dict[str, Any]


def settings_of(model: Model) -> Settings:
    """What decides the network, for the fingerprint of every stage that makes it."""
    return {"model": model.name, "architecture": settings(model.spec.architecture)}


def input_settings_of(model: Model) -> Settings:
    """What decides the preprocessing, besides the network."""
    return {key: value for key, value in settings(model.spec.input).items() if key not in ("min_size", "max_size")}


def open_shapes(shape: tuple[int, int, int], sizes: list[list[int]] | None) -> list[tuple[int, int, int]]:
    """The inputs that a network with open height and width must take: its own, the smallest, the largest."""
    return [shape, *((shape[0], height, width) for height, width in sizes or ())]


def open_dimensions(module: Any, shape: tuple[int, int, int], sizes: list[list[int]] | None) -> list[list[int]]:
    """Which dimensions of each output, besides the batch, follow the size of the input."""
    answers = [forward(module, example(other, 1)) for other in open_shapes(shape, sizes)]
    return [
        [axis for axis in range(1, same[0].ndim) if len({answer.shape[axis] for answer in same}) > 1]
        for same in zip(*answers, strict=True)
    ]


def code_of(model: Model) -> tuple[str, ...]:
    """The user's files that make the network: all Python files of the model, but a converter of its own."""
    network = model.spec.architecture.network
    if network is None:
        return ()
    converter = model.source((model.spec.weights.converter or "").partition(":")[0])
    return tuple(sorted({*python_files(model)} - {converter} | {model.source(network.partition(":")[0])}))


def python_files(model: Model) -> list[str]:
    return sorted(map(os.path.normpath, glob.glob(f"{MODELS}/{model.name}/**/*.py", recursive=True)))


def create(settings: Settings, weights: str | None = None, exportable: bool = False) -> "torch.nn.Module":
    """The network in inference mode, with the weights of a safetensors file or as the architecture initialises it.

    exportable: timm's variants of layers that old opsets can express.
    """
    import timm
    from safetensors.torch import load_file

    architecture = settings["architecture"]
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

    given = {key: value for key, value in overrides.items() if value is not None}
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


def transform(module: "torch.nn.Module", overrides: Settings) -> "Callable[[Image], torch.Tensor]":
    """The network's own preprocessing, from a PIL image to float32 (channels, height, width)."""
    from timm.data import create_transform

    preprocess: Callable[[Image], torch.Tensor] = create_transform(**data_config(module, overrides), is_training=False)
    return preprocess


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


def sensitivity(module: Any, batch: "torch.Tensor") -> float:
    """How far the outputs move, relative to their size, when every value of the batch moves by an ulp."""
    import torch

    moved = torch.from_numpy(moved_by_an_ulp(batch.numpy()))
    outputs, others = ([answer.numpy() for answer in forward(module, inputs)] for inputs in (batch, moved))
    return disagreement(others, outputs)


def example(shape: tuple[int, int, int], batch: int, seed: int = 0) -> "torch.Tensor":
    """A reproducible input of standard normal values."""
    import torch

    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))
