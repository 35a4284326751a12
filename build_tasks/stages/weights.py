"""weights: the source that the spec names -> weights.safetensors, under the keys of the network

    hf:// https:// timm:// package:// path random://
              └─► sha256 ─► converter ─► keys checked ─► weights.safetensors

Where the source is an ONNX file, it holds the network too:

    model.onnx ─► sha256 ─► input checked ─► tensors renamed ─► one run in ONNX Runtime ─► weights.onnx
"""

import functools
import math
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from build_tasks.errors import UserError, first_lines
from build_tasks.formats import pytorch_network, user_code, weight_sources
from build_tasks.formats.onnx_files import save_onnx
from build_tasks.formats.onnx_import import (
    IMPORT_MODULES,
    check_image_input,
    external_files,
    format_dims,
    read_onnx,
    rename_tensors,
)
from build_tasks.paths import MODELS
from build_tasks.runtime.limits import check_archive
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.model import Model, split_source, table_settings

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def task(model: Model) -> dict[str, Any]:
    file = os.path.basename(model.weights)
    random = "RANDOM weights, for structure tests only" if model.seed is not None else None
    return stage(model).task(doc=random or f"{file} from {model.spec.weights.source}")


def stage(model: Model) -> Stage:
    """The stage that fetches the source. `doit new` runs it without doit.

    A source that is a file of the user is an input. A download is identified by settings: its URL and sha256.
    """
    spec, weights = model.spec, model.spec.weights
    inputs: Paths = {}
    external: dict[str, str | None] = {}
    scheme, rest = split_source(weights.source)
    if scheme == "file":
        inputs["source"] = model.source(rest)
    elif scheme == "package":
        external["source"] = weight_sources.package_file(rest)
    elif (file := weight_sources.manual_path(model.name, weights.source)) and os.path.exists(file):
        inputs["source"] = file  # the user put it there, for example on a machine without a network
    if spec.from_onnx and "source" in inputs:
        inputs |= {path: path for path in external_data_files(inputs["source"])}
    user_files = pytorch_network.user_source_files(model)
    if weights.converter is not None:
        inputs["converter"] = model.source(weights.converter.partition(":")[0])
        user_files = (*user_files, *user_code.python_files(model))  # a converter may import the files beside it
    function = build_from_onnx if spec.from_onnx else build
    return Stage(
        name=f"weights:{model.name}",
        model=model,
        # The query may be a secret, and differs whenever the URL is signed. So it is no setting, which is recorded.
        build=functools.partial(function, query=model.query) if model.query else function,
        inputs=inputs,
        external_inputs=external,
        outputs={"weights": model.weights},
        settings={
            **pytorch_network.settings_of(model),
            "weights": table_settings(weights),
            **({"shape": spec.input.shape} if spec.from_onnx else {}),
        },
        tools=("torch", "timm", "safetensors"),
        modules=(
            __name__,
            "build_tasks.formats.weight_sources",
            *(IMPORT_MODULES if spec.from_onnx else ()),
            *pytorch_network.source_modules(model),
        ),
        source_files=user_files,
    )


def external_data_files(source: str) -> list[str]:
    """The files beside an ONNX file that are named as exporters name its external data. The file itself is not read."""
    folder, file = os.path.split(source)
    names = os.listdir(folder) if os.path.isfile(source) else []
    stem = re.escape(file.removesuffix(".onnx"))
    return sorted(
        f"{folder}/{name}" for name in names if re.fullmatch(rf"{stem}(\.onnx)?[._](data|bin|weights).*", name)
    )


def build(inputs: Paths, outputs: Paths, settings: Settings, query: str = "") -> Notes:
    from safetensors.torch import save_file

    source = settings["weights"]["source"]
    scheme, rest = split_source(source)
    if scheme == "random":
        state = random_state(settings, seed=int(rest))
    else:
        state = read_source(inputs, settings, read_state_dict, query, lambda path: [])
    if converter := settings["weights"]["converter"]:
        state = convert(state, settings["model"], converter)
    state = match_keys(state, pytorch_network.create_network(settings).state_dict(), source)
    save_file(state, outputs["weights"])
    parameters = sum(tensor.numel() for tensor in state.values())
    return {"weights": "RANDOM" if scheme == "random" else source, "parameters": parameters}


def build_from_onnx(inputs: Paths, outputs: Paths, settings: Settings, query: str = "") -> Notes:
    path = inputs.get("source", settings["weights"]["source"])
    graph = read_source(inputs, settings, read_onnx, query, external_files)
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
    except Exception as error:  # the errors of ONNX Runtime have no common base class
        raise UserError(f"{path} does not run in ONNX Runtime: {first_lines(error)}") from error
    parameters = sum(math.prod(tensor.dims) for tensor in graph.graph.initializer)
    return {"weights": settings["weights"]["source"], "parameters": parameters}


def read_source(
    inputs: Paths,
    settings: Settings,
    read: Callable[[str], T],
    query: str,
    files_beside: Callable[[str], list[str]],
) -> T:
    """The result of `read` for the source file. The file is fetched if it is not on this machine.

    Args:
        read: A function from a path to the content. If it raises a UserError, a downloaded file is deleted.
        query: The query of the URL, which the source in the settings does not have.
        files_beside: A function from the path to the names of further files that `read` needs in the same folder. They
            are fetched, too, if the source is a file on the hub.
    Raises:
        UserError: If the file cannot be fetched, has another sha256 than the spec says, or cannot be read.
    """
    source, sha256 = settings["weights"]["source"], settings["weights"]["sha256"]
    path = inputs.get("source") or weight_sources.fetch(settings["model"], source, query, sha256)
    if "source" in inputs:
        weight_sources.verify_sha256(path, sha256)
    try:
        if "source" not in inputs and source.startswith("hf://"):
            file, _, revision = source.partition("@")
            for name in files_beside(path):
                other = f"{os.path.dirname(file)}/{name}" + (f"@{revision}" if revision else "")
                weight_sources.fetch(settings["model"], other, "", None)
        return read(path)
    except UserError:
        if weight_sources.is_download(path):  # it may be a login page; the next run downloads the file again
            os.remove(path)
        raise


def random_state(settings: Settings, seed: int) -> "dict[str, torch.Tensor]":
    """The initial state dict of the architecture for one seed."""
    import random

    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return pytorch_network.create_network(settings).state_dict()


def read_state_dict(path: str) -> "dict[str, torch.Tensor]":
    """The state dict of a safetensors file or a checkpoint, unwrapped as timm does. No code in the file is executed."""
    import pickle

    from timm.models import load_state_dict

    check_archive(path)
    try:
        state: dict[str, torch.Tensor] = load_state_dict(path, use_ema=True, weights_only=True)
    except Exception as error:  # torch, safetensors and timm raise many classes for a file that they cannot read
        # torch's unpickler reports an "unsupported operand" for a file that is no pickle, for example a web page.
        cause = error.__cause__
        if isinstance(cause, pickle.UnpicklingError):
            if "Unsupported operand" in str(cause):
                raise UserError(f"{path} cannot be read as weights: it is not a checkpoint") from error
            raise UserError(f"{path} holds more than tensors and could execute code: save it as safetensors") from error
        raise UserError(f"{path} cannot be read as weights: {first_lines(error)}") from error
    return state


def convert(state: "dict[str, torch.Tensor]", model: str, converter: str) -> "dict[str, torch.Tensor]":
    """The state dict that the spec's converter returns.

    Raises:
        UserError: If the converter raises an error, or returns something else than a dict of tensors.
    """
    import torch

    path = f"{MODELS}/{model}/{converter.partition(':')[0]}"
    function = user_code.user_function(model, converter)
    try:
        result = function(state)
    except Exception as error:
        raise user_code.user_error(path, error) from error
    if not isinstance(result, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in result.values()):
        raise UserError(f"{MODELS}/{model}/{converter} must return a dict from keys to tensors")
    return result


def match_keys(
    state: "dict[str, torch.Tensor]", expected: "dict[str, torch.Tensor]", source: str
) -> "dict[str, torch.Tensor]":
    """`state` under the keys of `expected`, in its dtypes and its order.

    Raises:
        UserError: If any key or shape does not match. The message lists them.
    """
    # Older checkpoints lack a counter that only training uses. torch's own loader accepts that, too.
    optional = {key for key in expected if key.endswith("num_batches_tracked")}
    missing = sorted(expected.keys() - state.keys() - optional)
    unexpected = sorted(state.keys() - expected.keys())
    misshapen = sorted(
        f"{key} {list(state[key].shape)} instead of {list(expected[key].shape)}"
        for key in expected.keys() & state.keys()
        if state[key].shape != expected[key].shape
    )
    problems = {"missing": missing, "unexpected": unexpected, "wrongly shaped": misshapen}
    if any(problems.values()):
        details = "; ".join(f"{len(keys)} {kind}: {_first_keys(keys)}" for kind, keys in problems.items() if keys)
        raise UserError(f"{source} does not fit the architecture: {details}")
    return {key: state.get(key, tensor).to(tensor.dtype).clone().contiguous() for key, tensor in expected.items()}


def _first_keys(keys: list[str], limit: int = 8) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")
