"""`doit new`: writes the spec of a new model, with what is known of its architecture, and with comments.

    doit new NAME --architecture TIMM_NAME    timm's preprocessing, weights and labels of an architecture
    doit new [NAME] --from-onnx FILE          a copy of the file, which is tried: its size, and its batch

Nothing of the model's folder is there until all of it is.
"""

import json
import os
import shutil
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

from doit.cmd_base import Command

from build_tasks.errors import UserError, first_lines, with_suggestion
from build_tasks.paths import MODELS
from build_tasks.spec.model import Model, split_source

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

# Keys that many come to set, with an example where there is no default.
OFTEN_SET: dict[str, dict[str, Any]] = {
    "": {"formats": None, "max_batch_size": None, "ensemble": "onnx", "labels": "labels.txt"},
    "architecture": {},
    "weights": {},
    "input": {},
    "onnx": {"opset": None, "dynamic_axes": None, "batch_size": None},
    "engine": {"precision": None, "opt_batch_size": 8},
    "accuracy": {"samples": "samples"},
    "triton": {"release": None, "device": None},
}
COMMENTS_AT = 36  # columns

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of most networks


class Key(NamedTuple):
    """A key of the new spec."""

    table: str  # "" above all tables
    name: str
    value: Any
    comment: str = ""


class New(Command):  # type: ignore[misc]  # doit has no types
    """doit's command; whatever is heavy is imported when it is used."""

    doc_purpose = "write the spec of a new model, models/NAME/model.toml"
    doc_usage = "NAME --architecture TIMM_NAME [--weights SOURCE] | [NAME] --from-onnx FILE"
    doc_description = (
        "The spec holds what timm knows of the architecture: input size, mean, standard deviation, interpolation, "
        "crop, where its pretrained weights are, and the names of its classes. Of an ONNX file it holds what the file "
        "says of its input, and whether the batch can be open. All other keys are in docs/reference/spec.md."
    )
    cmd_options = (
        {
            "name": "architecture", "long": "architecture", "short": "a", "type": str, "default": "",
            "help": "of timm, with or without the tag of its weights: efficientnet_b3, resnet50.a1_in1k",
        },
        {
            "name": "weights", "long": "weights", "short": "w", "type": str, "default": "",
            "help": "weights.source of the spec; timm's own pretrained weights without it",
        },
        {
            "name": "from_onnx", "long": "from-onnx", "type": str, "default": "",
            "help": "for a model that exists only as ONNX: the file, which is copied",
        },
    )  # fmt: skip

    def parse_execute(self, words: list[str]) -> int:
        """NAME comes first or last; doit's parser knows options only in front."""
        first = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
        code: int = super().parse_execute([*words[first:], *words[:first]])
        return code

    def execute(self, options: dict[str, Any], arguments: list[str]) -> int:
        try:
            model = created(options, arguments)
        except (UserError, OSError) as error:
            sys.stderr.write(f"ERROR: {error}\n")
            return 3  # as doit where it refuses
        except ModuleNotFoundError as error:
            from build_tasks.runtime.worker import not_installed

            sys.stderr.write(f"ERROR: {not_installed(error)}\n")
            return 3
        sys.stdout.write(told(model))
        return 0


def created(options: dict[str, Any], arguments: list[str]) -> Model:
    """The new model, whose folder is in its place. UserError for what cannot be one."""
    file = options["from_onnx"].rstrip("/")
    names = arguments or ([os.path.basename(file).removesuffix(".onnx")] if file else [])
    if len(names) != 1 or bool(options["architecture"]) == bool(file) or (file and options["weights"]):
        raise UserError(f"expected: doit new {New.doc_usage}")
    (name,) = names
    check_name(name)
    if file:
        return of_onnx(name, file)
    about, keys = of_architecture(name, options["architecture"], options["weights"])
    return placed(name, rendered(about, keys))


def check_name(name: str) -> None:
    """UserError for what a model cannot be called; told before anything slow is done."""
    from build_tasks.doit_plugin.reserved_names import RESERVED
    from build_tasks.spec.validation import name_mistake

    if mistake := name_mistake(name, RESERVED):
        raise UserError(mistake)
    if os.path.lexists(f"{MODELS}/{name}"):
        raise UserError(f"{MODELS}/{name} exists already")


def placed(name: str, text: str, graph: str | None = None) -> Model:
    """Writes the spec, if it is one, into a folder that is then put in its place. graph: what comes beside it."""
    from build_tasks.doit_plugin import reserved_names
    from build_tasks.runtime import atomic_files
    from build_tasks.spec import loader

    model = loader.parse_new(name, text.encode(), reserved_names.RESERVED)
    with atomic_files.scratch_dir() as scratch:
        folder = f"{scratch}/{name}"
        os.mkdir(folder)
        with open(f"{folder}/model.toml", "w", encoding="utf-8") as file:
            file.write(text)
        if graph:
            copy = shutil.copytree if os.path.isdir(graph) else shutil.copyfile
            copy(graph, f"{folder}/model.onnx")
        atomic_files.flush(folder)
        atomic_files.replace(folder, f"{MODELS}/{name}")
    return model


def of_architecture(name: str, architecture: str, source: str) -> tuple[str, list[Key]]:
    """What a spec of an architecture is about, and its keys. UserError where timm does not know the architecture."""
    import timm
    from timm.data import infer_imagenet_subset, resolve_data_config

    from build_tasks.stages.labels import IMAGENET

    known = pretrained(architecture)
    config = resolve_data_config({"in_chans": 3}, pretrained_cfg=known.to_dict() if known else None)
    if known and known.has_weights and not source:
        architecture = ".".join(filter(None, (known.architecture, known.tag)))
    keys = [
        Key("architecture", "timm", architecture),
        Key("weights", "source", *weights(name, architecture, known, source)),
        Key("input", "shape", config["input_size"], f"channels, height, width{tested_at(known)}"),
        Key("input", "mean", config["mean"]),
        Key("input", "std", config["std"]),
        Key("input", "interpolation", config["interpolation"]),
        Key("input", "crop_pct", config["crop_pct"]),
        Key("input", "crop_mode", config["crop_mode"]),
    ]
    classes = known.num_classes if known else 0
    weights_license = known.license if known and known.has_weights and not source else None
    if (subset := infer_imagenet_subset({"num_classes": classes})) == IMAGENET:
        keys.insert(0, Key("", "labels", IMAGENET, "its 1000 classes, in timm's order"))
    about = [f"{architecture} of timm {timm.__version__}"]
    if classes and subset != IMAGENET:
        about.append(f"{classes} classes" + (f" ({subset})" if subset else ""))
    if weights_license:
        about.append(f"license of the weights: {weights_license}")
    return ", ".join(about), keys


def pretrained(architecture: str) -> "PretrainedCfg | None":
    """What timm knows of an architecture, under its default tag or that which is named; None where that is nothing."""
    import timm
    from timm.models import get_pretrained_cfg, is_model, list_models, list_pretrained

    base = architecture.partition(".")[0]
    if not is_model(base):
        found = with_suggestion(base, list_models())
        raise UserError(f"--architecture: expected an architecture of timm {timm.__version__}, found {found}")
    try:
        return get_pretrained_cfg(architecture)
    except RuntimeError:  # of a tag that there is not
        tags = [name for name in list_pretrained(f"{base}.*") if name.partition(".")[0] == base]
        expected = f"one of {', '.join(tags)}" if tags else f"{base}, which has no tags"
        raise UserError(f"--architecture: expected {expected}, found {with_suggestion(architecture, tags)}") from None


def weights(name: str, architecture: str, known: "PretrainedCfg | None", source: str) -> tuple[str, str]:
    """weights.source, and a comment on it."""
    from build_tasks.formats import weight_sources

    if source:
        return source, "RANDOM weights, for structure tests only" if split_source(source)[0] == "random" else ""
    if known is None or not known.has_weights:
        return "random://0", "RANDOM: timm has no pretrained weights of it; for structure tests, until you have some"
    source = f"timm://{architecture}" if known.hf_hub_id else str(known.url)
    return source, f"fetched; or put the file at {weight_sources.manual_path(name, source)}"


def tested_at(known: "PretrainedCfg | None") -> str:
    """The size that timm's own figures of accuracy are of, where that is another one."""
    size = known.test_input_size if known else None
    return f"; timm tests it at {size[1]} x {size[2]}" if size else ""


def of_onnx(name: str, file: str) -> Model:
    """A model of an ONNX file, or of a folder with its weights apart, as far as model.onnx tried out.

    UserError for a file that is none, and for one that no images go into.
    """
    from build_tasks.formats import onnx_import
    from build_tasks.runtime import atomic_files
    from build_tasks.spec import loader

    image = onnx_import.check_image_input(onnx_import.read_onnx(file), file)
    with atomic_files.scratch_dir() as scratch:
        for batch in (None, image[0] or 1):
            text = rendered(f"the ONNX file {os.path.basename(file)}", *of_image(image, batch))
            model = loader.parse(name, text.encode())
            try:
                try_onnx(model, file, scratch)
            except UserError:
                if batch or image[0] is None:
                    raise
            else:
                break
        return placed(name, text, onnx_import.pack_onnx(file, scratch))


def of_image(image: list[int | None], batch: int | None) -> tuple[list[Key], Collection[str]]:
    """The keys of a graph that takes such images, and which there are no use for. batch: None for an open one."""
    channels, height, width = (length or other for length, other in zip(image[1:], (3, 224, 224), strict=True))
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ([0.0] * channels, [1.0] * channels)
    where = "channels, height, width"
    keys = [
        Key("", "formats", ["onnx", "tensorrt"], "TorchScript cannot be made of it"),
        Key("weights", "source", "model.onnx", "the network and its weights"),
        Key(
            "input",
            "shape",
            [channels, height, width],
            where if all(image[1:]) else f"{where}: the file leaves it open",
        ),
        Key("input", "mean", mean, "an ONNX file does not say it: as in training"),
        Key("input", "std", std, "likewise"),
    ]
    if batch is None:
        return keys, ("opset", "batch_size")
    keys += [
        Key("onnx", "dynamic_axes", False, "the file's batch is fixed, and its nodes allow no other"),
        Key("onnx", "batch_size", batch),
    ]
    return keys, ("opset", "ensemble", "opt_batch_size")


def rendered(about: str, keys: list[Key], without: Collection[str] = ()) -> str:
    """The text of the spec: the keys, and, as comments, those that are often set, `without` some."""
    from build_tasks.spec.json_schema import SCHEMA_DIRECTIVE, schema

    defaults = schema()
    lines = [SCHEMA_DIRECTIVE, f"# {about}. All keys: docs/reference/spec.md"]
    for table, often in OFTEN_SET.items():
        given = [key for key in keys if key.table == table]
        free = often.keys() - {*without, *(key.name for key in given)}
        lines += ["", f"[{table}]"] if table and (given or free) else []
        lines += [line(key.name, key.value, key.comment) for key in given]
        for name in filter(free.__contains__, often):
            of = defaults["properties"][table]["properties"] if table == "triton" else properties(defaults, table)
            value = of[name]["default"] if often[name] is None else often[name]
            lines.append(line(f"# {name}", value, of[name]["description"]))
    return "\n".join(lines) + "\n"


def properties(schema: dict[str, Any], table: str) -> dict[str, Any]:
    """The keys of a table in the spec's schema."""
    of: dict[str, Any] = schema["$defs"][table.capitalize()] if table else schema
    found: dict[str, Any] = of["properties"]
    return found


def line(name: str, value: Any, comment: str) -> str:
    """A line of TOML; JSON's strings, numbers and lists are TOML's, too."""
    text = f"{name} = {json.dumps(value)}"
    return f"{text:<{COMMENTS_AT}}  # {comment}" if comment else text


def told(model: Model) -> str:
    """What was written, and what comes next."""
    lines = [f"wrote {model.file}"]
    scheme, rest = split_source(model.spec.weights.source)
    if scheme == "file" and not os.path.exists(path := model.source(rest)):
        lines.append(f"missing: {path}, its weights")
    if model.seed is not None:
        lines.append("its weights are RANDOM: weights.source says where real ones come from")
    lines.append(f"next: `doit plan {model.name}` tells what will run, `doit {model.name}` builds it")
    return "".join(f"{line}\n" for line in lines)


def try_onnx(model: Model, file: str, scratch: str) -> None:
    """Builds model.onnx of a model that is not there yet, into a scratch folder. UserError where that fails."""
    from build_tasks.runtime import worker
    from build_tasks.stages import onnx, weights

    for stage, inputs, names in (
        (weights.stage(model), {"source": file}, ("weights",)),
        (onnx.stage(model), {"weights": f"{scratch}/weights"}, ("model", "signature", "export", "tools")),
    ):
        outputs = {name: f"{scratch}/{name}" for name in names}
        try:
            worker.call(stage.build, inputs, outputs, stage.settings, log=f"{scratch}/log")
        except worker.CrashError as error:
            raise UserError(f"{file}: {first_lines(error)}") from error
