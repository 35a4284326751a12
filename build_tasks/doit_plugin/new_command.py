"""new: `doit new` writes the spec of a new model, with the facts that timm or a file with the network contains

    doit new NAME --architecture TIMM_NAME    timm's preprocessing, weights and labels of an architecture
    doit new [NAME] --from-onnx FILE          a copy of the file; see new_from_file.py
    doit new [NAME] --from-torch FILE         likewise, for TorchScript and torch.export
    doit new NAME --network FILE.py:FUNCTION  a network of your own: its inputs, by trial runs

The model's folder appears only when it is complete.
"""

import os
import re
import shutil
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from doit.cmd_base import Command

from build_tasks.doit_plugin.command_line import OneLineMistakes
from build_tasks.doit_plugin.spec_template import Key, format_spec
from build_tasks.errors import UserError, with_suggestion
from build_tasks.paths import MODELS
from build_tasks.spec.model import Model, split_source

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

PATHS = ("network", "weights", "from_onnx", "from_torch")  # options that may be paths


class New(OneLineMistakes, Command):  # type: ignore[misc]  # doit has no types
    """The command. Heavy modules are imported where they are used."""

    takes_names_first = True
    doc_purpose = "write the spec of a new model, models/NAME/model.toml"
    doc_usage = (
        "NAME --architecture TIMM_NAME [--weights SOURCE] | NAME --network FILE.py:FUNCTION [--weights SOURCE] | "
        "[NAME] --from-onnx FILE | [NAME] --from-torch FILE"
    )
    doc_description = (
        "With --architecture the spec gets what timm knows: input size, mean, standard deviation, interpolation, crop, "
        "the source of the pretrained weights, and the names of the classes. A checkpoint of --weights is copied "
        "beside the spec, which gets its number of classes and channels. With --from-onnx it gets the inputs of the "
        "file, and whether its batch can be open; with --from-torch and --network the inputs that trial runs find, or "
        "lines that say what to fill in. docs/reference/spec.md describes all other keys."
    )
    cmd_options = (
        {
            "name": "architecture", "long": "architecture", "short": "a", "type": str, "default": "",
            "help": "of timm, with or without the tag of its weights: efficientnet_b3, resnet50.a1_in1k",
        },
        {
            "name": "network", "long": "network", "type": str, "default": "",
            "help": "a function that builds your own network, network.py:build; it runs, and its files are copied",
        },
        {
            "name": "weights", "long": "weights", "short": "w", "type": str, "default": "",
            "help": "a checkpoint, which is read and copied, or another weights.source; default: timm's own weights",
        },
        {
            "name": "from_onnx", "long": "from-onnx", "type": str, "default": "",
            "help": "for a model that exists only as ONNX: the file, which is copied",
        },
        {
            "name": "from_torch", "long": "from-torch", "type": str, "default": "",
            "help": "for a model that exists only as TorchScript or torch.export: the file, which is copied",
        },
    )  # fmt: skip

    def execute(self, options: dict[str, Any], arguments: list[str]) -> int:
        try:
            model, found = create(options, arguments)
        except (UserError, OSError) as error:
            sys.stderr.write(f"ERROR: {error}\n")
            return 3  # doit's exit code for a command line that it does not accept
        except ModuleNotFoundError as error:
            from build_tasks.runtime.worker import not_installed

            sys.stderr.write(f"ERROR: {not_installed(error)}\n")
            return 3
        sys.stdout.write(format_result(model, found))
        return 0


def create(options: dict[str, Any], arguments: list[str]) -> tuple[Model, list[str]]:
    """Write the folder of the new model. Return the model, and lines about what was found in its checkpoint.

    Raises:
        UserError: If the command line or its values are not valid.
    """
    from build_tasks.doit_plugin import new_from_checkpoint

    options = {**options, **{key: checked_path(key, options[key]) for key in PATHS}}
    sources = [options[key].rstrip("/") for key in ("from_onnx", "from_torch") if options[key]]
    names = arguments or [os.path.splitext(os.path.basename(file))[0] for file in sources]
    own = [options[key] for key in ("architecture", "network") if options[key]]
    if len(names) != 1 or len(own) + len(sources) != 1 or (sources and options["weights"]):
        raise UserError(f"expected: doit new {New.doc_usage}")
    (name,) = names
    check_name(name)
    new_from_checkpoint.check_weights(options["weights"])
    for file in sources:
        from build_tasks.doit_plugin import new_from_file, new_from_torch
        from build_tasks.runtime import atomic_files
        from build_tasks.spec import loader

        show(f"trying the network in {file}: some seconds")
        with atomic_files.scratch_dir() as scratch:
            create_text = new_from_file.onnx_spec if options["from_onnx"] else new_from_torch.torch_spec
            text, source = create_text(name, file, scratch)
            target = split_source(loader.parse(name, text.encode()).spec.weights.source)[1]
            return write_model(name, text, {target: source}), []
    if options["network"]:
        return create_from_network(name, options["network"], options["weights"])
    architecture, weights = options["architecture"], options["weights"]
    show(f"looking up {architecture} in timm: some seconds")
    pretrained = pretrained_config(architecture)
    if not new_from_checkpoint.is_here(weights):
        return write_model(name, format_spec(*architecture_keys(name, architecture, pretrained, weights))), []
    from build_tasks.formats import checkpoint_facts

    facts = checkpoint_facts.read_facts(weights, architecture)
    source = new_from_checkpoint.weights_source(weights)
    description, keys = architecture_keys(name, architecture, pretrained, source, facts.arguments)
    text = format_spec(description, [*keys, *new_from_checkpoint.checkpoint_keys(facts)])
    found = new_from_checkpoint.found_lines(name, weights, facts, pretrained.num_classes if pretrained else 1000)
    return write_model(name, text, new_from_checkpoint.copied_files(weights)), found


def create_from_network(name: str, network: str, weights: str) -> tuple[Model, list[str]]:
    """Write the folder of a model with a network of the user, see create."""
    from build_tasks.doit_plugin import new_from_torch
    from build_tasks.runtime import atomic_files

    show(f"trying the network of {network}: some seconds")
    with atomic_files.scratch_dir() as scratch:
        text, files, found = new_from_torch.network_spec(name, network, weights or "random://0", scratch)
    return write_model(name, text, files), found


def checked_path(option: str, path: str) -> str:
    """Return a path of the command line with the user's home folder in the place of `~`, as in `--weights=~/net.pth`.

    Raises:
        UserError: If it is not UTF-8, as all of a spec must be.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"--{option.replace('_', '-')}: expected a name in UTF-8, found {path}: rename the file"
        ) from None
    return os.path.expanduser(path)


def show(line: str) -> None:
    """Write a line to a terminal at once, before libraries are imported or a file is read."""
    if sys.stdout.isatty():
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def check_name(name: str) -> None:
    """Check the name of the model, before anything slow is done.

    Raises:
        UserError: If a model cannot have this name, or has it already.
    """
    from build_tasks.doit_plugin.reserved_names import RESERVED
    from build_tasks.spec.validation import name_mistake

    if mistake := name_mistake(name, RESERVED):
        raise UserError(mistake)
    if os.path.lexists(f"{MODELS}/{name}"):
        raise UserError(f"{MODELS}/{name} exists already")


def write_model(name: str, text: str, files: Mapping[str, str] = MappingProxyType({})) -> Model:
    """Check the spec and write the folder of its model; see write_folder."""
    from build_tasks.doit_plugin import reserved_names
    from build_tasks.spec import loader

    model = loader.parse_new(name, text.encode(), reserved_names.RESERVED)
    write_folder(name, text, files)
    return model


def write_folder(name: str, text: str, files: Mapping[str, str]) -> None:
    """Write a checked spec into a scratch folder, and rename that to the model's folder.

    Args:
        text: The content of model.toml.
        files: Files and folders that are copied beside the spec: their path by their name in the model's folder.
    Raises:
        UserError: If a file has the name of the spec.
    """
    from build_tasks.runtime import atomic_files

    if source := files.get("model.toml"):
        raise UserError(f"{source}: model.toml is the name of the spec beside which it is copied: rename the file")
    with atomic_files.scratch_dir() as scratch:
        folder = f"{scratch}/{name}"
        os.mkdir(folder)
        with open(f"{folder}/model.toml", "w", encoding="utf-8") as file:
            file.write(text)
        for target, source in files.items():
            os.makedirs(os.path.dirname(f"{folder}/{target}"), exist_ok=True)
            copy = shutil.copytree if os.path.isdir(source) else shutil.copyfile
            copy(source, f"{folder}/{target}")
        atomic_files.flush(folder)
        check_name(name)  # again, because a trial build takes a while
        atomic_files.replace(folder, f"{MODELS}/{name}")


def architecture_keys(
    name: str,
    architecture: str,
    pretrained: "PretrainedCfg | None",
    source: str,
    arguments: Mapping[str, int] = MappingProxyType({}),
) -> tuple[str, list[Key]]:
    """Return a description of an architecture of timm, and the keys of its spec.

    Args:
        pretrained: Its result of pretrained_config.
        source: The value of weights.source; "" for timm's own weights.
        arguments: num_classes and in_chans of a checkpoint, where they are not those of the architecture.
    """
    import timm
    from timm.data import infer_imagenet_subset, resolve_data_config

    from build_tasks.stages.labels import IMAGENET

    channels = arguments.get("in_chans", 3)
    config = resolve_data_config({"in_chans": 3}, pretrained_cfg=pretrained.to_dict() if pretrained else None)
    if channels != 3:
        config |= {"input_size": (channels, *config["input_size"][1:])}
        config |= {"mean": [0.0] * channels, "std": [1.0] * channels}
    if pretrained and pretrained.has_weights and not source:
        architecture = ".".join(filter(None, (pretrained.architecture, pretrained.tag)))
    unknown = "" if channels == 3 else "use the values of the training"
    keys = [
        Key("architecture", "timm", architecture),
        Key("weights", "source", *weights_source(name, architecture, pretrained, source)),
        Key("input", "shape", config["input_size"], f"channels, height, width{test_size_comment(pretrained)}"),
        Key("input", "mean", config["mean"], unknown),
        Key("input", "std", config["std"], unknown),
        Key("input", "interpolation", config["interpolation"]),
        Key("input", "crop_pct", config["crop_pct"]),
        Key("input", "crop_mode", config["crop_mode"]),
    ]
    classes = arguments.get("num_classes", pretrained.num_classes if pretrained else 0)
    weights_license = pretrained.license if pretrained and pretrained.has_weights and not source else None
    if (subset := infer_imagenet_subset({"num_classes": classes})) == IMAGENET:
        keys.insert(0, Key("", "labels", IMAGENET, "its 1000 classes, in timm's order"))
    description_parts = [f"{architecture} of timm {timm.__version__}"]
    if classes and subset != IMAGENET:
        description_parts.append(f"{classes} classes" + (f" ({subset})" if subset else ""))
    if weights_license:
        description_parts.append(f"license of the weights: {weights_license}")
    return ", ".join(description_parts), keys


def pretrained_config(architecture: str) -> "PretrainedCfg | None":
    """Return timm's configuration of the pretrained weights, of the default tag if no tag is named.

    Returns: None if timm has no weights for the architecture.
    Raises:
        UserError: If timm does not know the architecture, or the tag.
    """
    import timm
    from timm.models import get_pretrained_cfg, is_model, list_models, list_pretrained

    base = architecture.partition(".")[0]
    if not is_model(base):
        suggestion = with_suggestion(base, list_models())
        raise UserError(f"--architecture: expected an architecture of timm {timm.__version__}, found {suggestion}")
    try:
        return get_pretrained_cfg(architecture)
    except RuntimeError:  # timm has no such tag
        tags = [name for name in list_pretrained(f"{base}.*") if name.partition(".")[0] == base]
        expected = f"one of {', '.join(tags)}" if tags else f"{base}, which has no tags"
        raise UserError(f"--architecture: expected {expected}, found {with_suggestion(architecture, tags)}") from None


def weights_source(name: str, architecture: str, pretrained: "PretrainedCfg | None", source: str) -> tuple[str, str]:
    """Return the value of weights.source, and a comment on it."""
    from build_tasks.formats import weight_sources

    if source:
        return source, "RANDOM weights, for structure tests only" if split_source(source)[0] == "random" else ""
    if pretrained is None or not pretrained.has_weights:
        return "random://0", "RANDOM, for structure tests only: timm has no pretrained weights of this architecture"
    source = f"timm://{architecture}" if pretrained.hf_hub_id else str(pretrained.url)
    return source, f"fetched; or put the file at {weight_sources.manual_path(name, source)}"


def test_size_comment(pretrained: "PretrainedCfg | None") -> str:
    """Return a comment on the input size of timm's own accuracy figures, if it is another one."""
    size = pretrained.test_input_size if pretrained else None
    return f"; timm tests it at {size[1]} x {size[2]}" if size else ""


def format_result(model: Model, found: list[str]) -> str:
    """Return the lines about the written files, what was found in a checkpoint, and the next command."""
    lines = [f"wrote {model.file}", *found]
    scheme, rest = split_source(model.spec.weights.source)
    if scheme == "file" and not os.path.exists(path := model.source(rest)):
        lines.append(f"missing: {path}, the weights of the model")
    with open(model.file, encoding="utf-8") as file:
        for key, what in re.findall(r"^(\w+) = .*# .*fill in: (.*)$", file.read(), re.MULTILINE):
            lines.append(f"fill in: {key} in {model.file}: {what}")
    if model.seed is not None:
        lines.append("the weights are RANDOM: set weights.source for real ones")
    lines.append(f"next: `doit plan {model.name}` shows what will run, `doit {model.name}` builds it")
    return "".join(f"{line}\n" for line in lines)
