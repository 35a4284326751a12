"""weights: whatever the spec names as a source -> weights.safetensors, with the network's own keys.

hf:// https:// timm:// package:// path random://
          └─► sha256 ─► converter ─► keys checked ─► weights.safetensors
"""

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from build_tasks.errors import UserError, first_lines
from build_tasks.formats import pytorch_network, weight_sources
from build_tasks.formats.onnx_files import save_onnx
from build_tasks.formats.onnx_import import check_image_input, format_dims, read_onnx, rename_tensors
from build_tasks.paths import MODELS
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.model import Model, settings, split_source

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def task(model: Model) -> dict[str, Any]:
    file = os.path.basename(model.weights)
    random = "RANDOM weights, for structure tests only" if model.seed is not None else None
    return stage(model).task(doc=random or f"{file} from {model.spec.weights.source}")


def stage(model: Model) -> Stage:
    """The stage that fetches the source; `build_from_onnx` where that is an ONNX file."""
    spec, weights = model.spec, model.spec.weights
    inputs: Paths = {}
    elsewhere: dict[str, str | None] = {}
    scheme, rest = split_source(weights.source)
    if scheme == "file":
        inputs["source"] = model.source(rest)
    elif scheme == "package":
        elsewhere["source"] = weight_sources.package_file(rest)
    elif (placed := weight_sources.manual_path(model.name, weights.source)) and os.path.exists(placed):
        inputs["source"] = placed
    user_files = pytorch_network.user_source_files(model)
    if weights.converter is not None:
        inputs["converter"] = model.source(weights.converter.partition(":")[0])
        user_files = (*user_files, *pytorch_network.python_files(model))  # it may import what stands beside it
    return Stage(
        name=f"weights:{model.name}",
        model=model,
        build=build_from_onnx if spec.from_onnx else build,
        inputs=inputs,
        external_inputs=elsewhere,
        outputs={"weights": model.weights},
        settings={
            **pytorch_network.settings_of(model),
            "weights": settings(weights),
            **({"shape": spec.input.shape} if spec.from_onnx else {}),
        },
        tools=("torch", "timm", "safetensors"),
        modules=(
            __name__,
            "build_tasks.formats.weight_sources",
            *(("build_tasks.formats.onnx_import",) if spec.from_onnx else ()),
            *pytorch_network.source_modules(model),
        ),
        source_files=user_files,
    )


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    from safetensors.torch import save_file

    source = settings["weights"]["source"]
    scheme, rest = split_source(source)
    state = random_state(settings, seed=int(rest)) if scheme == "random" else taken(inputs, settings, read)
    if converter := settings["weights"]["converter"]:
        state = converted(state, settings["model"], converter)
    state = matched(state, pytorch_network.create_network(settings).state_dict(), source)
    save_file(state, outputs["weights"])
    parameters = sum(tensor.numel() for tensor in state.values())
    return {"weights": "RANDOM" if scheme == "random" else source, "parameters": parameters}


def build_from_onnx(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    path = inputs.get("source", settings["weights"]["source"])
    graph = taken(inputs, settings, read_onnx)
    image = check_image_input(graph, path)
    for axis, length in enumerate(settings["shape"], start=1):
        if image[axis] not in (None, length):
            raise UserError(f"input.shape: {path} takes {format_dims(image)}, not {settings['shape']}")
    save_onnx(rename_tensors(graph), outputs["weights"], external_data=False)
    try:
        network = pytorch_network.create_network(settings, outputs["weights"])
        pytorch_network.forward(network, pytorch_network.example_input(settings["shape"], 2))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # of ONNX Runtime, whose errors have no common base
        raise UserError(f"{path} does not run in ONNX Runtime: {first_lines(error)}") from error
    parameters = sum(math.prod(tensor.dims) for tensor in graph.graph.initializer)
    return {"weights": settings["weights"]["source"], "parameters": parameters}


def taken(inputs: Paths, settings: Settings, read: Callable[[str], T]) -> T:
    """What `read` makes of the source: a file that is here, or that is fetched; verified."""
    source, sha256 = settings["weights"]["source"], settings["weights"]["sha256"]
    path = inputs.get("source") or weight_sources.fetch(settings["model"], source, sha256)
    if "source" in inputs:
        weight_sources.verify_sha256(path, sha256)
    try:
        return read(path)
    except UserError:
        if weight_sources.is_download(path):  # a page that asks for a login, say; the next run fetches anew
            os.remove(path)
        raise


def random_state(settings: Settings, seed: int) -> "dict[str, torch.Tensor]":
    """The architecture's own initialisation under a seed."""
    import random

    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return pytorch_network.create_network(settings).state_dict()


def read(path: str) -> "dict[str, torch.Tensor]":
    """The state dict of a safetensors file or a checkpoint, unwrapped as timm does. No code in it is executed."""
    import pickle

    from timm.models import load_state_dict

    try:
        state: dict[str, torch.Tensor] = load_state_dict(path, use_ema=True, weights_only=True)
    except Exception as error:  # whatever torch, safetensors or timm say of a file that is none of theirs
        # torch's unpickler meets an "unsupported operand" in what is no pickle at all, a web page for example.
        cause = error.__cause__
        if isinstance(cause, pickle.UnpicklingError):
            if "Unsupported operand" in str(cause):
                raise UserError(f"{path} cannot be read as weights: it is no checkpoint") from error
            raise UserError(f"{path} holds more than tensors and could execute code: save it as safetensors") from error
        raise UserError(f"{path} cannot be read as weights: {first_lines(error)}") from error
    return state


def converted(state: "dict[str, torch.Tensor]", model: str, converter: str) -> "dict[str, torch.Tensor]":
    """What the spec's converter makes of it. UserError where that fails, or is something else."""
    import torch

    path = f"{MODELS}/{model}/{converter.partition(':')[0]}"
    function = pytorch_network.user_function(model, converter)
    try:
        result = function(state)
    except Exception as error:
        raise pytorch_network.user_error(path, error) from error
    if not isinstance(result, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in result.values()):
        raise UserError(f"{MODELS}/{model}/{converter} must return a dict from keys to tensors")
    return result


def matched(state: "dict[str, torch.Tensor]", own: "dict[str, torch.Tensor]", source: str) -> "dict[str, torch.Tensor]":
    """`state` in the dtype and under the keys of `own`. UserError that lists every key that does not match."""
    # Older checkpoints lack the counter that only training uses, as torch's own loader knows.
    optional = {key for key in own if key.endswith("num_batches_tracked")}
    missing = sorted(own.keys() - state.keys() - optional)
    unexpected = sorted(state.keys() - own.keys())
    wrong = sorted(
        f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own.keys() & state.keys()
        if state[key].shape != own[key].shape
    )
    problems = {"missing": missing, "unexpected": unexpected, "wrongly shaped": wrong}
    if any(problems.values()):
        told = "; ".join(f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in problems.items() if keys)
        raise UserError(f"{source} does not fit the architecture: {told}")
    return {key: state.get(key, own[key]).to(own[key].dtype).clone().contiguous() for key in own}


def _some(keys: list[str], limit: int = 8) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")
