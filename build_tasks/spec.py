"""models/<model>/model.toml: what a model's owner can ask for, and how a mistake is answered.

The spec is data: reading it executes nothing of the model and imports nothing heavy.
"""

import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

from msgspec import Meta, Struct, ValidationError, convert, field, to_builtins

from build_tasks.errors import UserError

MODELS = "models"
BUILD = "build"
REPOSITORY = "model_repository"


class Format(NamedTuple):
    """How Triton knows a format.

    Source: the server's docs/user_guide/model_configuration.md, and src/constants.h of its core.
    """

    suffix: str  # of the Triton model's name, after the model's
    platform: str
    file: str  # in the version's folder


FORMATS = {
    "torchscript": Format("", "pytorch_libtorch", "model.pt"),
    "onnx": Format("_onnx", "onnxruntime_onnx", "model.onnx"),
    # the engine stage will add: "engine": Format("_trt", "tensorrt_plan", "model.plan")
}

# The fields of Triton's ModelConfig. Those that follow from the artifact cannot be set.
DERIVED = {"name", "platform", "backend", "max_batch_size", "input", "output", "default_model_filename"}
TRITON = DERIVED | {
    "runtime", "version_policy", "optimization", "sequence_batching", "dynamic_batching", "ensemble_scheduling",
    "instance_group", "cc_model_filenames", "metric_tags", "parameters", "model_warmup", "model_operations",
    "model_transaction_policy", "model_repository_agents", "response_cache", "model_metrics", "batch_input",
    "batch_output",
}  # fmt: skip

# What timm.create_model would fetch or load by itself.
WEIGHTS_ARGUMENTS = {"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"}

SCHEMES = ("hf", "https", "http", "package", "timm", "random")

Positive = Annotated[int, Meta(ge=1)]
Text = Annotated[str, Meta(min_length=1)]


class Table(Struct, forbid_unknown_fields=True, kw_only=True):
    """A table of the spec; `to_builtins` gives what a stage takes into its fingerprint."""


class Architecture(Table):
    timm: Text | None = None  # a timm architecture, "efficientnet_b3"
    network: str | None = None  # or a function of the model's own: "network.py:build"
    arguments: dict[str, Any] = {}  # passed to whichever of the two makes the module


class Weights(Table):
    source: Text
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")] | None = None
    converter: str | None = None  # "convert.py:function", from the file's keys to the network's


class Input(Table):
    """Overrides of the architecture's own preprocessing (timm's data config)."""

    shape: Annotated[list[Positive], Meta(min_length=3, max_length=3)] | None = None  # C, H, W
    mean: list[float] | None = None
    std: list[Annotated[float, Meta(gt=0)]] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    crop_pct: Annotated[float, Meta(gt=0, le=1)] | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None


class Onnx(Table):
    exporter: Literal["auto", "torchscript", "dynamo"] = "auto"
    opset: Annotated[int, Meta(ge=7, le=23)] = 17
    dynamic_axes: bool = True  # the batch dimension stays open
    batch_size: Positive = 1  # of the example that is exported; the batch itself where dynamic_axes is false
    external_data: bool = False  # weights in a file of their own; always so above 2 GB


class Engine(Table):
    precision: Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8"] = "fp16"
    min_batch_size: Positive = 1
    opt_batch_size: Positive = 8
    max_batch_size: Positive = 32


class Accuracy(Table):
    samples: Text | None = None  # a folder of images in the model's folder; the shipped photographs without it
    tolerance: Annotated[float, Meta(gt=0, lt=1)] = 1e-4  # relative L2 error of every output
    top1: Annotated[float, Meta(ge=0, le=1)] = 1.0  # share of samples whose strongest class must stay the same
    allow_untestable: bool = False  # publish a model whose outputs say nothing about accuracy


class Spec(Table):
    architecture: Architecture
    weights: Weights
    input: Input = field(default_factory=Input)
    formats: Annotated[list[Literal["torchscript", "onnx"]], Meta(min_length=1)] = field(
        default_factory=lambda: ["torchscript", "onnx"]
    )
    max_batch_size: Positive = 32  # the largest batch that is served, and that is checked
    labels: Text | None = None  # "imagenet-1k", or a text file in the model's folder, one class per line
    onnx: Onnx = field(default_factory=Onnx)
    engine: Engine | None = None
    accuracy: Accuracy = field(default_factory=Accuracy)
    triton: dict[str, Any] = {}  # further fields of Triton's ModelConfig, under its names


@dataclass(frozen=True)
class Model:
    name: str
    spec: Spec

    @property
    def file(self) -> str:
        return f"{MODELS}/{self.name}/model.toml"

    def source(self, path: str) -> str:
        """A path of the spec, which is relative to the model's folder."""
        return os.path.normpath(f"{MODELS}/{self.name}/{path}") if not os.path.isabs(path) else path

    def artifact(self, file: str) -> str:
        return f"{BUILD}/{self.name}/{file}"

    def triton_name(self, format: str) -> str:
        return self.name + FORMATS[format].suffix

    @property
    def seed(self) -> int | None:
        """The seed of random weights, None for real ones."""
        scheme, rest = split_source(self.spec.weights.source)
        return int(rest) if scheme == "random" else None


def split_source(source: str) -> tuple[str, str]:
    """(scheme, rest) of a weights source; a bare path has the scheme "file"."""
    scheme, separator, rest = source.partition("://")
    return (scheme, rest) if separator else ("file", source)


def load(reserved: Iterator[str] | tuple[str, ...] = ()) -> list[Model]:
    """All models under models/, by name. UserError with a line for every mistake in any of them.

    reserved: names that a model cannot have, because doit knows something else by them.
    """
    folders = sorted(f for f in _folders() if os.path.exists(f"{MODELS}/{f}/model.toml"))
    if not folders:
        raise UserError(f"{MODELS}/: there is no model here; a model is a folder with a file model.toml")
    models, mistakes = [], []
    for name in folders:
        try:
            models.append(_read(name))
        except UserError as error:
            mistakes.append(str(error))
    mistakes += _name_mistakes(folders, models, set(reserved))
    if mistakes:
        raise UserError("\n".join(mistakes))
    return models


def _folders() -> list[str]:
    try:
        return os.listdir(MODELS)
    except FileNotFoundError:
        return []


def _name_mistakes(folders: list[str], models: list[Model], reserved: set[str]) -> Iterator[str]:
    for name in folders:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            yield (
                f"{MODELS}/{name}: a model's name is made of letters, digits, _ and -, "
                "and begins with a letter or digit"
            )
        elif name in reserved:
            yield f"{MODELS}/{name}: doit knows a command or stage named {name}; rename the folder"
    owner: dict[str, str] = {}
    for model in models:
        for format in model.spec.formats:
            triton_name = model.triton_name(format)
            if triton_name in owner:
                yield f"{model.file}: format {format} is served as {triton_name}, and so is {owner[triton_name]}"
            owner[triton_name] = f"format {format} of {model.file}"


def _read(name: str) -> Model:
    path = f"{MODELS}/{name}/model.toml"
    try:
        with open(path, "rb") as file:
            document = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    try:
        model = Model(name, convert(document, Spec))
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(str(error), document)}") from None
    if mistakes := [f"{path}: {key}: expected {expected}, found {found}" for key, expected, found in _mistakes(model)]:
        raise UserError("\n".join(mistakes))
    return model


def _mistakes(model: Model) -> Iterator[tuple[str, str, str]]:
    """What the types cannot say: (key, expected, found)."""
    spec = model.spec
    if (spec.architecture.timm is None) == (spec.architecture.network is None):
        found = "neither" if spec.architecture.timm is None else "both"
        yield "architecture", "either `timm` or `network`", found
    if spec.architecture.network is not None and spec.input.shape is None:
        yield "input.shape", "[channels, height, width], since the network is your own", "nothing"
    functions = {"architecture.network": spec.architecture.network, "weights.converter": spec.weights.converter}
    for key, value in functions.items():
        if value is not None and not re.fullmatch(r"[^:]+\.py:[A-Za-z_]\w*", value):
            yield key, "`file.py:function`", repr(value)
    scheme, rest = split_source(spec.weights.source)
    if scheme not in (*SCHEMES, "file"):
        known = [f"{s}://" for s in SCHEMES]
        yield "weights.source", f"one of {', '.join(known)} or a path", _hinted(f"{scheme}://", known)
    elif scheme == "random" and not rest.isdecimal():
        yield "weights.source", "random:// and a seed", repr(spec.weights.source)
    elif scheme == "random" and int(rest) >= 2**64:
        yield "weights.source", "random:// and a seed below 2**64", repr(spec.weights.source)
    elif scheme in ("http", "https") and not re.fullmatch(r"[^/?#]+/([^?#]*/)?[^/?#]+([?#].*)?", rest):
        yield "weights.source", f"`{scheme}://host/path/file`", repr(spec.weights.source)
    elif scheme == "hf" and not re.fullmatch(r"[^/@]+/[^/@]+/[^@]+(@[^@]+)?", rest):
        yield "weights.source", "`hf://owner/repository/file@revision`", repr(spec.weights.source)
    elif scheme == "package" and not re.fullmatch(r"[A-Za-z_]\w*/.+", rest):
        yield "weights.source", "`package://package/path/in/it`", repr(spec.weights.source)
    elif not rest:
        yield "weights.source", "something after ://", repr(spec.weights.source)
    if scheme == "random" and spec.weights.sha256 is not None:
        yield "weights.sha256", "nothing, since random weights have no file", repr(spec.weights.sha256)
    for argument in sorted(WEIGHTS_ARGUMENTS & spec.architecture.arguments.keys()):
        yield (
            f"architecture.arguments.{argument}",
            "nothing, since [weights] says it",
            repr(spec.architecture.arguments[argument]),
        )
    for field_name in spec.triton:
        if field_name in DERIVED:
            expected = "nothing, since it follows from the artifact"
            if field_name == "max_batch_size":
                expected += " (the key max_batch_size stands above the tables)"
            yield f"triton.{field_name}", expected, repr(spec.triton[field_name])
        elif field_name not in TRITON:
            yield "triton", "fields of Triton's ModelConfig", _hinted(field_name, TRITON - DERIVED)
    if len(set(spec.formats)) != len(spec.formats):
        yield "formats", "each format once", repr(spec.formats)
    if (engine := spec.engine) and not engine.min_batch_size <= engine.opt_batch_size <= engine.max_batch_size:
        found = f"{engine.min_batch_size}, {engine.opt_batch_size}, {engine.max_batch_size}"
        yield "engine", "min_batch_size <= opt_batch_size <= max_batch_size", found


def _explain(message: str, document: dict[str, Any]) -> str:
    """msgspec's message as `key: expected …, found …`, with the nearest valid name."""
    message, _, path = message.partition(" - at `$")
    keys = re.findall(r"\.([\w-]+)|\[(\d+|\.\.\.)\]", path)
    table: type[Struct] = Spec
    found: Any = document
    key = ""
    for name, index in keys:
        found = found[name] if name else found[int(index)] if index.isdecimal() else found
        key += f".{name}" if name else f"[{index}]"
        table = _table_of(table, name) or table
    key = key.lstrip(".") or "top level"
    if unknown := re.search(r"unknown field `(.+)`", message, re.DOTALL):
        fields = table.__struct_fields__
        return f"{key}: expected one of {', '.join(fields)}, found {_hinted(unknown[1], fields)}"
    if missing := re.search(r"missing required field `(.+)`", message):
        return f"{key}: expected the key {missing[1]!r}, found nothing"
    if "Invalid enum value" in message:
        choices = _choices(get_type_hints(table, include_extras=True)[keys[-1][0] or keys[-2][0]])
        return f"{key}: expected one of {', '.join(choices)}, found {_hinted(found, choices)}"
    expected = re.sub(r"^Expected |, got .*$| \| null", "", message.replace("`", "")).replace("object", "table")
    return f"{key}: expected {expected}, found {found!r}"


def _table_of(table: type[Struct], name: str) -> type[Struct] | None:
    hint = get_type_hints(table).get(name)
    return next((t for t in (hint, *get_args(hint)) if isinstance(t, type) and issubclass(t, Struct)), None)


def _choices(hint: Any) -> list[str]:
    if getattr(hint, "__origin__", None) is Literal:
        return [str(choice) for choice in get_args(hint)]
    return [choice for argument in get_args(hint) for choice in _choices(argument)]


def _hinted(found: object, valid: Any) -> str:
    import difflib

    near = difflib.get_close_matches(str(found), list(valid), n=1)
    return f"{found!r}" + (f" (did you mean {near[0]!r}?)" if near else "")


def settings(table: Table) -> dict[str, Any]:
    """A table as plain data, as it stands in a stage's fingerprint."""
    plain: dict[str, Any] = to_builtins(table)
    return plain
