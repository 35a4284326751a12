"""model.toml -> Model, and how a mistake in it is answered: the file, the key, what was expected, what was found."""

import contextlib
import os
import re
import tomllib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_type_hints

from msgspec import Struct, ValidationError, convert

from build_tasks.errors import UserError, with_suggestion
from build_tasks.paths import MODELS
from build_tasks.spec.model import Model, Spec, split_source, table_settings
from build_tasks.spec.overrides import Overrides
from build_tasks.spec.tables import (
    DEVICES,
    NATIVE_PRECISIONS,
    QUANTIZED_PRECISIONS,
    RELEASE,
    Architecture,
    Input,
    Onnx,
    Output,
    TorchScript,
)
from build_tasks.triton import releases

GATE_FITS = {"format", "precision", "output"}  # keys of a rule of accuracy.gate that say what it is for
ONE_PRECISION = ("torchscript", "onnx")  # formats that one file is served in

# What timm.create_model would fetch or load by itself.
WEIGHTS_ARGUMENTS = {"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"}

SCHEMES = ("hf", "https", "http", "package", "timm", "random")


def load(
    reserved: Iterable[str] = (),
    overrides: Mapping[str, Overrides] | None = None,
    known: Mapping[str, Mapping[str, str]] | None = None,
    folders: Sequence[str] | None = None,
) -> list[Model]:
    """All models under models/, by name. UserError with a line for every mistake in any of them.

    folders: what `names` said.
    reserved: names that a model cannot have, because doit knows something else by them.
    overrides: what the command line puts in the place of keys, by model.
    known: what is not read, since it has not changed: by model, Triton's models and what each is.
    """
    folders, known = names() if folders is None else folders, known or {}
    if not folders:
        raise UserError(f"{MODELS}/: there is no model here; a model is a folder with a file model.toml")
    models, mistakes = [], []
    for name in folders:
        if name in known:
            continue
        try:
            models.append(_read(name, (overrides or {}).get(name, {})))
        except UserError as error:
            mistakes.append(str(error))
    serves = {**known, **{model.name: model.triton_models for model in models}}
    mistakes += _name_mistakes(folders, serves, set(reserved))
    if mistakes:
        raise UserError("\n".join(mistakes))
    return models


def names() -> list[str]:
    """The models' names, sorted."""
    return sorted(folder for folder in _folders() if os.path.exists(f"{MODELS}/{folder}/model.toml"))


def _folders() -> list[str]:
    try:
        return os.listdir(MODELS)
    except FileNotFoundError:
        return []


def name_mistake(name: str, reserved: Container[str]) -> str | None:
    """Why a model cannot have a name, None where it can."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        return f"{MODELS}/{name}: a model's name is made of letters, digits, _ and -, and begins with a letter or digit"
    if name in reserved:
        return f"{MODELS}/{name}: doit knows a command or stage named {name}; rename the folder"
    return None


def _name_mistakes(
    folders: Sequence[str], serves: Mapping[str, Mapping[str, str]], reserved: set[str]
) -> Iterator[str]:
    yield from filter(None, (name_mistake(name, reserved) for name in folders))
    owner: dict[str, str] = {}
    for name in sorted(serves):
        file = f"{MODELS}/{name}/model.toml"
        for triton_name, what in serves[name].items():
            if triton_name in owner:
                yield f"{file}: {what} is served as {triton_name}, and so is {owner[triton_name]}"
            owner[triton_name] = f"{what} of {file}"


def added(name: str, content: bytes, reserved: Iterable[str]) -> Model:
    """A model that is to come beside those that are there. UserError with a line for every mistake in it."""
    others = []
    for folder in _folders():
        with contextlib.suppress(UserError):  # a mistake in another one is no business of this one's
            others.append(_read(folder, {}))
    model = parsed(name, content)
    if mistakes := list(_name_mistakes([name], {m.name: m.triton_models for m in [*others, model]}, set(reserved))):
        raise UserError("\n".join(mistakes))
    return model


def _read(name: str, overrides: Overrides) -> Model:
    path = f"{MODELS}/{name}/model.toml"
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return parsed(name, content, overrides)


def parsed(name: str, content: bytes, overrides: Overrides | None = None) -> Model:
    """The model of a model.toml's content. UserError with a line for every mistake in it."""
    path, overrides = f"{MODELS}/{name}/model.toml", overrides or {}
    try:
        document = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    where = path
    for (table, key), (typed, value) in overrides.items():
        where += f" {typed.removesuffix(' True')}"
        if isinstance(document.setdefault(table, {}), dict):
            document[table][key] = value
    try:
        model = Model(name, convert(document, Spec))
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(str(error), document)}") from None
    if mistakes := [
        f"{where}: {key}: expected {expected}, found {found}" for key, expected, found in _mistakes(model, overrides)
    ]:
        raise UserError("\n".join(mistakes))
    return model


def _mistakes(model: Model, overrides: Overrides) -> Iterator[tuple[str, str, str]]:
    """What the types cannot say: (key, expected, found)."""
    spec = model.spec
    if spec.from_onnx:
        yield from _only_onnx_mistakes(spec)
    elif (spec.architecture.timm is None) == (spec.architecture.network is None):
        found = "neither" if spec.architecture.timm is None else "both"
        yield "architecture", "either `timm` or `network`", found
    if (spec.architecture.network is not None or spec.from_onnx) and spec.input.shape is None:
        whose = "it is not asked of an ONNX file" if spec.from_onnx else "the network is your own"
        yield "input.shape", f"[channels, height, width], since {whose}", "nothing"
    yield from _size_mistakes(spec.input)
    functions = {"architecture.network": spec.architecture.network, "weights.converter": spec.weights.converter}
    for key, value in functions.items():
        if value is not None and not re.fullmatch(r"[^:]+\.py:[A-Za-z_]\w*", value):
            yield key, "`file.py:function`", repr(value)
    scheme, rest = split_source(spec.weights.source)
    if scheme not in (*SCHEMES, "file"):
        known = [f"{s}://" for s in SCHEMES]
        yield "weights.source", f"one of {', '.join(known)} or a path", with_suggestion(f"{scheme}://", known)
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
    yield from _triton_mistakes(model, overrides)
    yield from _gate_mistakes(model)
    if len(set(spec.formats)) != len(spec.formats):
        yield "formats", "each format once", repr(spec.formats)
    yield from _engine_mistakes(spec, overrides)


def _only_onnx_mistakes(spec: Spec) -> Iterator[tuple[str, str, str]]:
    """What only a PyTorch network can be asked for, where weights.source is an ONNX file."""
    file = "since weights.source is ONNX"
    given = {
        "architecture": (spec.architecture, Architecture(), Architecture.__struct_fields__),
        "input": (spec.input, Input(), ("format",)),
        "output": (spec.output, Output(), Output.__struct_fields__),
        "torchscript": (spec.torchscript, TorchScript(), TorchScript.__struct_fields__),
        "onnx": (spec.onnx, Onnx(), ("exporter", "opset")),
    }
    for table, (found, default, keys) in given.items():
        for key in keys:
            if (value := getattr(found, key)) != getattr(default, key):
                yield f"{table}.{key}", f"nothing, {file}, which is taken as it is", repr(value)
    if spec.weights.converter is not None:
        yield "weights.converter", f"nothing, {file}", repr(spec.weights.converter)
    if "torchscript" in spec.formats:
        yield "formats", f"no torchscript, {file}, of which PyTorch makes nothing", repr(spec.formats)


def _triton_mistakes(model: Model, overrides: Overrides) -> Iterator[tuple[str, str, str]]:
    spec, triton = model.spec, model.spec.triton
    if not isinstance(model.triton("release"), str) or not re.fullmatch(RELEASE, model.release):
        yield "triton.release", 'a release of Triton\'s containers, such as "26.08"', repr(triton["release"])
    elif "onnx" in spec.formats and (reads := releases.onnx_support(model.release)) and spec.onnx.opset > reads.opset:
        newer = releases.oldest_release_for(spec.onnx.opset)
        hint = f", or triton.release = {newer!r} or newer" if newer else ""
        yield "onnx.opset", f"at most {reads.opset}, which Triton {model.release} reads{hint}", repr(spec.onnx.opset)
    if (device := model.triton("device")) not in DEVICES:
        yield "triton.device", f"one of {', '.join(DEVICES)}", with_suggestion(device, DEVICES)
    elif device == "cpu" and "tensorrt" in spec.formats:
        yield "formats", 'no tensorrt, since triton.device = "cpu"', repr(spec.formats)
    if not isinstance(model.triton("provenance"), bool):
        yield "triton.provenance", "bool", repr(triton["provenance"])
    for key in ("warm_up", "keep_versions"):
        if type(count := model.triton(key)) is not int or count < 1:
            yield f"triton.{key}", "int >= 1", repr(count)
            return
    if "warm_up" in triton and (device != "gpu" or "torchscript" not in spec.formats):
        expected = 'nothing, since it is for torchscript where triton.device = "gpu"'
        yield "triton.warm_up", expected, repr(triton["warm_up"])
    if spec.ensemble is not None and spec.ensemble not in spec.formats:
        expected = (
            f"one of the formats, {', '.join(model.served_formats)}"
            if model.served_formats
            else "nothing: no format is served"
        )
        yield "ensemble", expected, repr(spec.ensemble)
    elif spec.ensemble is not None and model.largest_batch(spec.ensemble) == 0 and not overrides:
        yield "ensemble", "a format with an open batch, which onnx.dynamic_axes = false closes", repr(spec.ensemble)
    elif spec.ensemble == "tensorrt" and not spec.engine.keep_io_types and not overrides:
        yield "ensemble", "engine.keep_io_types = true, since pictures are prepared in fp32", "false"
    elif spec.ensemble is not None and spec.input.shape is not None and spec.input.shape[0] != 3:
        yield "ensemble", "nothing, since pictures have 3 channels", f"input.shape = {spec.input.shape}"
    # A batch that holds for one run is no contradiction to what [triton] says for all others.
    if model.config_fields and not overrides:
        from build_tasks.triton import model_config_checks  # Triton's protobuf, for those who set fields of it

        for key, expected, found in model_config_checks.mistakes(model.serving_facts):
            yield f"triton.{key}".rstrip("."), expected, found


def _size_mistakes(size: Input) -> Iterator[tuple[str, str, str]]:
    if size.min_size is None and size.max_size is None:
        return
    if size.min_size is None or size.max_size is None:
        yield "input", "min_size and max_size, or neither", "one of them"
    elif size.shape is None:
        yield "input.shape", "[channels, height, width], the size between min_size and max_size to tune for", "nothing"
    elif not all(a <= b <= c for a, b, c in zip(size.min_size, size.shape[1:], size.max_size, strict=True)):
        found = f"{size.min_size}, {size.shape[1:]}, {size.max_size}"
        yield "input", "min_size <= height and width of shape <= max_size", found


def _gate_mistakes(model: Model) -> Iterator[tuple[str, str, str]]:
    accuracy = model.spec.accuracy
    for index, rule in enumerate(accuracy.gate):
        given = {key for key, value in table_settings(rule).items() if value is not None}
        if not given - GATE_FITS:
            limits = ", ".join(sorted(set(rule.__struct_fields__) - GATE_FITS))
            yield f"accuracy.gate[{index}]", f"a limit: one of {limits}", "none"
        if rule.format in ONE_PRECISION and rule.precision not in (None, served := model.precision(rule.format)):
            yield f"accuracy.gate[{index}].precision", f"{served}, as {rule.format} is", repr(rule.precision)
        if accuracy.truth is None and not {"top1_drop", "top5_drop"}.isdisjoint(given):
            yield "accuracy.truth", f"what the samples show, since gate[{index}] limits the loss of accuracy", "nothing"


def _engine_mistakes(spec: Spec, overrides: Overrides) -> Iterator[tuple[str, str, str]]:
    engine = spec.engine
    smallest, best, largest = spec.profile
    if not smallest <= best <= largest:
        yield "engine", "min_batch_size <= opt_batch_size <= max_batch_size", f"{smallest}, {best}, {largest}"
    if not spec.onnx.dynamic_axes:
        for key in ("min_batch_size", "opt_batch_size", "max_batch_size"):
            if ("onnx", "dynamic_axes") in overrides and ("engine", key) not in overrides:
                continue  # a batch that is fixed for one run overrides the spec's profile, too
            if getattr(engine, key) not in (None, spec.onnx.batch_size):
                expected = f"{spec.onnx.batch_size}, the batch that onnx.dynamic_axes = false fixes"
                yield f"engine.{key}", expected, repr(getattr(engine, key))
    if engine.precision != "fp16" and not engine.keep_io_types:
        yield "engine.keep_io_types", "true, since clients have fp32 and fp16 and nothing narrower", "false"
    if engine.precision in NATIVE_PRECISIONS and engine.keep_fp32:
        yield "engine.keep_fp32", f"nothing, since all of {engine.precision} is fp32", repr(engine.keep_fp32)
    if engine.calibration is not None and engine.precision not in QUANTIZED_PRECISIONS:
        yield "engine.calibration", f"nothing, since {engine.precision} is not calibrated", repr(engine.calibration)
    if engine.precision in NATIVE_PRECISIONS and engine.repair:
        yield "engine.repair", f"false, since all of {engine.precision} is fp32", "true"
    if engine.strip_plan and "tensorrt" in spec.formats:
        yield "engine.strip_plan", "false, since Triton cannot refit a plan without weights", "true"
    for key in ("compute_capabilities", "rtx_compute_capabilities"):
        if len(set(getattr(engine, key))) != len(getattr(engine, key)):
            yield f"engine.{key}", "each once", repr(getattr(engine, key))


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
        return f"{key}: expected one of {', '.join(fields)}, found {with_suggestion(unknown[1], fields)}"
    if missing := re.search(r"missing required field `(.+)`", message):
        return f"{key}: expected the key {missing[1]!r}, found nothing"
    if "Invalid enum value" in message:
        choices = _choices(get_type_hints(table, include_extras=True)[keys[-1][0] or keys[-2][0]])
        return f"{key}: expected one of {', '.join(choices)}, found {with_suggestion(found, choices)}"
    expected = re.sub(r"^Expected |, got .*$| \| null", "", message.replace("`", "")).replace("object", "table")
    return f"{key}: expected {expected}, found {found!r}"


def _table_of(table: type[Struct], name: str) -> type[Struct] | None:
    hint = get_type_hints(table).get(name)
    return next((t for t in (hint, *get_args(hint)) if isinstance(t, type) and issubclass(t, Struct)), None)


def _choices(hint: Any) -> list[str]:
    if getattr(hint, "__origin__", None) is Literal:
        return [str(choice) for choice in get_args(hint)]
    return [choice for argument in get_args(hint) for choice in _choices(argument)]
