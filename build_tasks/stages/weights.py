"""weights: the source that the spec names -> weights.safetensors, under the keys of the network

    hf:// https:// timm:// package:// path random://
              └─► sha256 ─► checkpoint ─► converter, or the dict in it that fits ─► keys checked ─► weights.safetensors

An ONNX file holds the network too:

    model.onnx ─► sha256 ─► inputs checked ─► tensors renamed ─► one run in ONNX Runtime ─► weights.onnx

and so does a file of TorchScript or torch.export, which is kept as it is:

    model.pt, model.pt2 ─► sha256 ─► runs at batches 2 and 3 ─► weights.pt, weights.pt2
"""

import contextlib
import functools
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from build_tasks.errors import UserError, first_lines, last_line
from build_tasks.formats import declarations, user_code, weight_sources
from build_tasks.formats.declarations import CHECKPOINT_MODULES, EDIT_MODULES, IMPORT_MODULES, INTERFACE_MODULES
from build_tasks.paths import MODELS
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec import model_files
from build_tasks.spec.interface import interface_of
from build_tasks.spec.model import Model, split_source, table_settings
from build_tasks.tensors import OUTPUT, Interface, dims_at, served_name, tuned_lengths

if TYPE_CHECKING:
    import onnx
    import torch

    from build_tasks.formats.checkpoints import Checkpoint

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
    elif inputs.get("source", "").endswith(model_files.INDEX):
        folder = os.path.dirname(inputs["source"])
        inputs |= {path: path for path in (f"{folder}/{name}" for name in model_files.shards(inputs["source"]))}
    user_files = declarations.user_source_files(model)
    if weights.converter is not None:
        inputs["converter"] = model.source(weights.converter.partition(":")[0])
        user_files = (*user_files, *user_code.python_files(model))  # a converter may import the files beside it
    function = build_from_onnx if spec.from_onnx else build_from_torch if spec.program_suffix else build
    return Stage(
        name=f"weights:{model.name}",
        model=model,
        # The query may be a secret, and differs whenever the URL is signed. So it is no setting, which is recorded.
        build=functools.partial(function, query=model.query) if model.query else function,
        inputs=inputs,
        external_inputs=external,
        outputs={"weights": model.weights, **({"license": path} if (path := model.weights_license) else {})},
        settings={
            **declarations.settings_of(model),
            "weights": table_settings(weights),
            **({"interface": interface_of(spec)} if spec.from_onnx or spec.program_suffix else {}),
            **(declarations.file_settings_of(model) if spec.from_onnx else {}),
        },
        tools=("torch", "timm", "safetensors"),
        modules=(
            __name__,
            "build_tasks.formats.weight_license",
            "build_tasks.formats.weight_sources",
            *((*IMPORT_MODULES, *EDIT_MODULES) if spec.from_onnx else CHECKPOINT_MODULES),
            *(INTERFACE_MODULES if spec.from_onnx or spec.program_suffix else ()),
            *declarations.source_modules(model),
        ),
        source_files=user_files,
    )


def external_data_files(source: str) -> list[str]:
    """The files that hold the external data of an ONNX file: those that it names, and those that exporters call so."""
    folder, file = os.path.split(source)
    names = os.listdir(folder) if os.path.isfile(source) else []
    stem = re.escape(file.removesuffix(".onnx"))
    usual = [name for name in names if re.fullmatch(rf"{stem}(\.onnx)?[._](data|bin|weights).*", name)]
    return sorted(f"{folder}/{name}" for name in {*usual, *model_files.external_data(source)})


def build(inputs: Paths, outputs: Paths, settings: Settings, query: str = "") -> Notes:
    from safetensors.torch import save_file

    from build_tasks.formats import checkpoint_cleaning, pytorch_network, state_dicts, weight_license

    source = settings["weights"]["source"]
    scheme, rest = split_source(source)
    if scheme == "random":
        path, checkpoint = "", random_state(settings, seed=int(rest))
    else:
        path, checkpoint = read_source(inputs, settings, read_with_path, query, model_files.shards)
    network = pytorch_network.create_network(settings)
    if converter := settings["weights"]["converter"]:
        unwrapped, notes = checkpoint_cleaning.unwrap(checkpoint, settings["weights"]["ema"])
        state = user_code.convert_weights(unwrapped, settings["model"], converter)
    else:
        prefix, ema = settings["weights"]["prefix"], settings["weights"]["ema"]
        state, notes = state_dicts.fit(checkpoint, network, source, prefix, path, ema)
    notes |= checkpoint_cleaning.type_notes(state, network.state_dict())
    state = state_dicts.match_keys(state, network.state_dict(), source)
    save_file(state, outputs["weights"])
    weight_license.write_license(source, inputs, outputs)
    parameters = sum(tensor.numel() for tensor in state.values())
    return {"weights": "RANDOM" if scheme == "random" else source, "parameters": parameters, **notes}


def build_from_onnx(inputs: Paths, outputs: Paths, settings: Settings, query: str = "") -> Notes:
    from build_tasks.formats import pytorch_network, ragged_batches, weight_license
    from build_tasks.formats.example_inputs import example_inputs
    from build_tasks.formats.onnx_files import save_onnx
    from build_tasks.formats.onnx_import import check_answers, external_files, read_onnx, report_damage
    from build_tasks.formats.serving_interface import forward, wrap_for_serving

    path = inputs.get("source", settings["weights"]["source"])
    graph = read_source(inputs, settings, read_onnx, query, external_files)
    interface: Interface = settings["interface"]
    with report_damage(path):
        import_interface(graph, path, interface, settings)
        ragged_batches.describe(graph, settings["ragged"])
        save_onnx(graph, outputs["weights"], external_data=False)
    weight_license.write_license(settings["weights"]["source"], inputs, outputs)
    try:
        network = wrap_for_serving(pytorch_network.create_network(settings, outputs["weights"]), interface)
        answers = forward(network, example_inputs(interface, 2))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # the errors of ONNX Runtime have no common base class
        raise UserError(f"{path} does not run in ONNX Runtime: {first_lines(error, 2)}") from error
    check_answers(answers, graph, path)
    parameters = sum(math.prod(tensor.dims) for tensor in graph.graph.initializer)
    return {"weights": settings["weights"]["source"], "parameters": parameters}


def import_interface(graph: "onnx.ModelProto", path: str, interface: Interface, settings: Settings) -> None:
    """Give a graph the inputs and outputs of the spec. With [[inputs]], outputs keep the names of the file by default.

    Raises:
        UserError: If the graph does not have them.
    """
    from build_tasks.formats.onnx_batch_first import put_batch_first
    from build_tasks.formats.onnx_import import (
        check_image_input,
        check_output_types,
        format_dims,
        match_inputs,
        select_outputs,
    )
    from build_tasks.formats.onnx_names import rename_tensors

    if settings["picture"]:
        image, lengths = check_image_input(graph, path), tuned_lengths(interface["dimensions"])
        shape = dims_at(interface["inputs"][0]["shape"] or [], lengths)
        if any(own not in (None, length) for own, length in zip(image[1:], shape, strict=True)):
            raise UserError(f"input.shape: {path} takes {format_dims(image)}, not {shape}")
    else:
        match_inputs(graph, path, interface, settings["batch_dimensions"]["inputs"], settings["ragged"])
    names = [each["name"] for each in interface["outputs"]]
    if names:
        select_outputs(graph, path, settings["output_keys"], names)
    check_output_types(graph, path)
    for index, tensor in enumerate(graph.graph.output[len(names) :]):
        names.append(OUTPUT.format(index) if settings["picture"] else served_name(tensor.name))
    axes = settings["batch_dimensions"]
    put_batch_first(graph, path, axes["inputs"] or [0], axes["outputs"])  # [input] has no key: a picture has it first
    rename_tensors(graph, [each["name"] for each in interface["inputs"]], names)


def build_from_torch(inputs: Paths, outputs: Paths, settings: Settings, query: str = "") -> Notes:
    from build_tasks.formats import pytorch_network, state_dicts, torch_program, weight_license
    from build_tasks.formats.example_inputs import example_inputs
    from build_tasks.formats.serving_interface import format_inputs, forward, wrap_for_serving

    source = settings["weights"]["source"]
    path = read_source(inputs, settings, torch_program.check_program, query, lambda path: [])
    shutil.copyfile(path, outputs["weights"])
    weight_license.write_license(source, inputs, outputs)
    interface: Interface = settings["interface"]
    network = wrap_for_serving(pytorch_network.create_network(settings, path), interface)
    for batch in (2, 3):
        example = example_inputs(interface, batch)
        try:
            answers = forward(network, example)
        except Exception as error:  # whatever the program raises
            reason = last_line(error)
            raise UserError(
                f"{source} does not run on {format_inputs(example)}: {reason}; expected the inputs of the spec, in "
                "batches of any size"
            ) from error
    state_dicts.require_finite(dict(network.named_parameters()), source)
    if any(answer.is_floating_point() and bool(answer.isnan().any()) for answer in answers):
        state_dicts.require_finite(dict(network.named_buffers()), source)  # else a mask of infinities is one
    return {"weights": source, "parameters": sum(tensor.numel() for tensor in network.parameters())}


def read_source(
    inputs: Paths,
    settings: Settings,
    read: Callable[[str], T],
    query: str,
    files_beside: Callable[[str], list[str]],
) -> T:
    """The result of `read` for the source file. The file is fetched if it is not on this machine.

    Args:
        read: A function from a path to the content. If it raises a UserError, a downloaded file is deleted, and the
            message names the source.
        query: The query of the URL, which the source in the settings does not have.
        files_beside: A function from the path to the names of further files that `read` needs in the same folder. They
            are fetched, too, if the source is a file on the hub.
    Raises:
        UserError: If the file cannot be fetched, has another sha256 than the spec says, or cannot be read.
    """
    model, source, sha256 = settings["model"], settings["weights"]["source"], settings["weights"]["sha256"]
    if path := inputs.get("source"):
        weight_sources.verify_sha256(path, sha256)
        return read(path)
    path = weight_sources.fetch(model, source, query, sha256)
    if source.startswith("hf://"):
        with name_source(model, source, path):
            names = files_beside(path)
        fetch_beside(model, source, path, names)
    with name_source(model, source, path):
        return read(path)


@contextlib.contextmanager
def name_source(model: str, source: str, path: str) -> Iterator[None]:
    """Name the source in a UserError about a fetched file, whose path the user did not choose, and delete a download.

    It may be a login page. The next run downloads the file again.
    """
    try:
        yield
    except UserError as error:
        if weight_sources.is_download(path):
            os.remove(path)
        by_hand = f"; or put the file at {found}" if (found := weight_sources.manual_path(model, source)) else ""
        raise UserError(f"{str(error).replace(path, source)}{by_hand}") from error


def fetch_beside(model: str, source: str, path: str, names: list[str]) -> None:
    """Fetch further files from the folder of a file on the hub, of the same commit: a branch may have moved meanwhile.

    Args:
        path: Where the client has put the file, snapshots/<commit>/<path in the repository>.
    """
    repository, file, _ = weight_sources.hub_file(source)
    commit = os.path.basename(path.removesuffix(f"/{file}"))
    by_hand = f"put {os.path.basename(file)} and the files that it names into {MODELS}/{model}"
    for name in names:
        other = os.path.join(repository, os.path.dirname(file), name)
        weight_sources.fetch(model, f"hf://{other}@{commit}", "", None, by_hand)


def read_with_path(path: str) -> "tuple[str, Checkpoint]":
    """The path of a checkpoint and its content."""
    from build_tasks.formats import checkpoints

    return path, checkpoints.read_checkpoint(path)


def random_state(settings: Settings, seed: int) -> "dict[str, torch.Tensor]":
    """The initial state dict of the architecture for one seed."""
    import random

    import numpy
    import torch

    from build_tasks.formats import pytorch_network

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return pytorch_network.create_network(settings).state_dict()
