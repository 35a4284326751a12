"""The specs that `doit new` writes for networks of PyTorch, whose inputs trial runs find; see network_inputs.py.

--from-torch FILE              a file of TorchScript or torch.export
--network FILE.py:FUNCTION     a function of Python ─► its file, and those beside it that it imports, are copied
                                                   └─► a copy in a folder of its own builds the network, too?
"""

import os
import shutil
from typing import TYPE_CHECKING

from build_tasks.doit_plugin import new_from_checkpoint
from build_tasks.doit_plugin.new_from_file import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    call,
    format_outputs,
    input_tables,
    sample_keys,
)
from build_tasks.doit_plugin.spec_template import Key, default_of, format_spec
from build_tasks.errors import UserError, listed
from build_tasks.paths import MODELS
from build_tasks.spec.model import split_source

if TYPE_CHECKING:
    from build_tasks.formats.network_inputs import FoundInputs


def torch_spec(name: str, file: str, scratch: str) -> tuple[str, str]:
    """Return the spec of a model that exists only as TorchScript or torch.export, and the path of the source to copy.

    Args:
        name: The name of the model.
        file: The file.
        scratch: A folder for the log of the trial run.
    Raises:
        UserError: If the file contains no network.
    """
    from build_tasks.formats import network_inputs, torch_program

    if not os.path.isfile(file):
        raise UserError(f"--from-torch: expected a file, found {file!r}, which is none")
    torch_program.check_program(file)
    found = call(network_inputs.inputs_of_file, file, log=f"{scratch}/log")
    suffix = ".pt2" if torch_program.is_exported(file) else ".pt"
    keys = [Key("weights", "source", f"model{suffix}", "the network and its weights")]
    return torch_text(f"the file {os.path.basename(file)}", keys, found), file


def network_spec(name: str, network: str, weights: str, scratch: str) -> tuple[str, dict[str, str], list[str]]:
    """Return the spec of a model whose network is a function of the user, after trial runs of the network.

    Args:
        name: The name of the model.
        network: `path/of/file.py:function`.
        weights: A checkpoint, which is looked into, or another value of weights.source.
        scratch: A folder for the files of the trial.
    Returns:
        The text of the spec, the files to copy beside it by their new name, and lines about what was found.
    Raises:
        UserError: If the function does not build a network, or if the checkpoint cannot be read.
    """
    from build_tasks.formats import network_trial

    path, _, function = network.partition(":")
    if not os.path.isfile(path) or not path.endswith(".py") or not function:
        raise UserError(f"--network: expected a Python file and its function, net.py:build, found {network!r}")
    is_checkpoint = new_from_checkpoint.is_here(weights)
    trial = call(network_trial.try_network, path, function, weights if is_checkpoint else "", log=f"{scratch}/log")
    folder, file = os.path.split(path)
    files = {each: os.path.join(folder, each) for each in (file, *trial.files)}
    found = [f"copied beside {file}: {listed(trial.files)}, which it imports"] if trial.files else []
    found += missing_files(name, file, function, files, scratch)
    source = weights
    comment = "RANDOM weights, for structure tests only" if split_source(weights)[0] == "random" else ""
    if is_checkpoint:
        source, beside = new_from_checkpoint.weights_source(weights), new_from_checkpoint.copied_files(weights)
        if taken := sorted(files.keys() & beside.keys()):
            raise UserError(f"{beside[taken[0]]} and {files[taken[0]]} cannot lie in one folder: rename one of them")
        files |= beside
    keys = [
        Key("architecture", "network", f"{file}:{function}"),
        Key("weights", "source", source, comment),
    ]
    if trial.checkpoint:
        keys += new_from_checkpoint.checkpoint_keys(trial.checkpoint)
        found.append(new_from_checkpoint.found_line(weights, trial.checkpoint))
    return torch_text(f"the network of {file}", keys, trial.inputs), files, found


def missing_files(name: str, file: str, function: str, files: dict[str, str], scratch: str) -> list[str]:
    """Return a line on what to add to the model's folder, if copies of the files alone do not build the network.

    A network may read files by a path beside its own, which nothing shows before it fails.

    Args:
        name: The name of the model.
        file: The Python file of the network.
        files: The path of each file by its name in the folder.
        scratch: A folder for the copies.
    """
    from build_tasks.formats import network_trial

    folder = f"{scratch}/{name}"
    for target, source in files.items():
        os.makedirs(os.path.dirname(f"{folder}/{target}"), exist_ok=True)
        shutil.copyfile(source, f"{folder}/{target}")
    try:
        call(network_trial.check_network, f"{folder}/{file}", function, log=f"{scratch}/log")
    except UserError as error:
        reason = str(error).replace(folder, f"{MODELS}/{name}")
        return [f"fill in: the files in {MODELS}/{name} that {file} reads: {reason}"]
    return []


def torch_text(description: str, keys: list[Key], found: "FoundInputs") -> str:
    """Return the text of the spec of a network of PyTorch: [input] if it takes one picture, otherwise [[inputs]]."""
    outputs = format_outputs(found.outputs) if any(place for _, place in found.outputs) else ""
    if found.max_batch and found.max_batch < default_of("max_batch_size"):
        keys.append(Key("", "max_batch_size", found.max_batch, "the largest that the file takes"))
    if found.half:
        keys.append(Key("", "formats", ["torchscript"], f"it computes in {found.half}; ONNX is checked in float32"))
    if not found.picture:
        return format_spec(description, keys, ("ensemble",)) + input_tables(found.inputs, found.dimensions) + outputs
    shape = [int(length) for length in found.inputs[0].shape or []]
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if shape[0] == 3 else ([0.0] * shape[0], [1.0] * shape[0])
    keys += [
        Key("input", "shape", shape, f"channels, height, width, {found.comment}"),
        Key("input", "mean", mean, "not in the file: use the value of the training"),
        Key("input", "std", std, "the same"),
        *sample_keys(shape[0]),
    ]
    return format_spec(description, keys) + outputs
