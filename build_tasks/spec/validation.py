"""Mistakes in a spec: (key, what was expected, what was found).

The types of tables.py catch what one key alone cannot be; `type_mistake` words these errors. `mistakes` finds what only
several keys together show. Checks of Triton's own fields are in the package triton.
"""

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_type_hints

from msgspec import Struct, ValidationError, convert

from build_tasks.errors import listed, with_suggestion
from build_tasks.paths import MODELS
from build_tasks.spec import ensemble_checks, pictures, precision_checks, source_checks, value_checks
from build_tasks.spec.model import Model, Spec, table_settings
from build_tasks.spec.overrides import Overrides
from build_tasks.spec.tables import (
    DEVICES,
    END,
    MAX_CORES,
    RELEASE,
    Aoti,
    Architecture,
    Input,
    Onnx,
    Output,
    TorchScript,
)
from build_tasks.spec.value_checks import MAX_NAME, Mistake
from build_tasks.triton import releases

GATE_SELECTORS = {"format", "precision", "output"}  # keys of a rule of accuracy.gate that are not limits
ONE_PRECISION = ("torchscript", "onnx", "aoti")  # formats whose artifacts have one precision

MORE = " (docs/reference/spec.md)"

# Arguments with which timm.create_model would fetch or load weights itself.
WEIGHTS_ARGUMENTS = {"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"}


def name_mistake(name: str, reserved: Container[str]) -> str | None:
    """Return why a model cannot have this name, None if it can."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        return f"{MODELS}/{name}: a model's name is made of letters, digits, _ and -, and begins with a letter or digit"
    if len(name) > MAX_NAME:
        return f"{MODELS}/{name[:20]}…: a model's name has at most {MAX_NAME} characters, and this one has {len(name)}"
    if name in reserved:
        return f"{MODELS}/{name}: doit has a command or stage named {name}; rename the folder"
    return None


def name_mistakes(
    names: Sequence[str], triton_models: Mapping[str, Mapping[str, str]], reserved: set[str]
) -> Iterator[str]:
    """Yield a line for each wrong name of a model, and for each name that two Triton models would share.

    Args:
        names: Names of the models.
        triton_models: Model.triton_models, by model.
        reserved: Names that doit uses.
    """
    yield from filter(None, (name_mistake(name, reserved) for name in names))
    owners: dict[str, str] = {}
    for name in sorted(triton_models):
        file = f"{MODELS}/{name}/model.toml"
        for triton_name, artifact in triton_models[name].items():
            if triton_name in owners:
                yield f"{file}: {artifact} is served as {triton_name}, and so is {owners[triton_name]}"
            owners[triton_name] = f"{artifact} of {file}"


def mistakes(model: Model, overrides: Overrides) -> Iterator[Mistake]:
    """Yield the mistakes of a spec whose types are right.

    Args:
        overrides: Values of the spec that come from the command line, and so hold for one run only.
    """
    spec = model.spec
    if spec.from_onnx:
        yield from _onnx_source_mistakes(spec)
    elif spec.program_suffix:
        yield from _program_mistakes(spec)
    elif (spec.architecture.timm is None) == (spec.architecture.network is None):
        found = "neither" if spec.architecture.timm is None else "both"
        yield "architecture", "either `timm` or `network`", found
    if spec.inputs or spec.dimensions or spec.outputs:
        from build_tasks.spec import tensor_checks  # few specs have these tables

        yield from tensor_checks.mistakes(spec)
    own = spec.architecture.network or spec.from_onnx or spec.program_suffix
    if own and not spec.inputs and spec.input.shape is None:
        source = "your own network" if spec.architecture.network else "an ONNX file" if spec.from_onnx else "the file"
        yield "input.shape", f"[channels, height, width], since it is not read from {source}", "nothing"
    yield from _size_mistakes(spec.input)
    functions = {"architecture.network": spec.architecture.network, "weights.converter": spec.weights.converter}
    for key, value in functions.items():
        if value is not None and not re.fullmatch(r"[^:]+\.py:[A-Za-z_]\w*", value):
            yield key, "`file.py:function`", repr(value)
    if spec.weights.prefix is not None and spec.weights.converter is not None:
        yield "weights.prefix", "nothing, since weights.converter chooses the tensors", repr(spec.weights.prefix)
    timm_arguments = spec.architecture.arguments if spec.architecture.timm else {}
    yield from pictures.mistakes(spec.input, timm_arguments.get("in_chans"))
    yield from source_checks.mistakes(model)
    yield from value_checks.mistakes(model)
    for argument in sorted(WEIGHTS_ARGUMENTS & spec.architecture.arguments.keys()):
        key = f"architecture.arguments.{argument}"
        yield key, "nothing, since [weights] sets the weights", repr(spec.architecture.arguments[argument])
    yield from _triton_mistakes(model, overrides)
    yield from _gate_mistakes(model)
    if len(set(spec.formats)) != len(spec.formats):
        yield "formats", "each format once", repr(spec.formats)
    yield from precision_checks.mistakes(model, overrides)


def _onnx_source_mistakes(spec: Spec) -> Iterator[Mistake]:
    """Yield keys that only a PyTorch network can have, if weights.source is an ONNX file."""
    reason = "since weights.source is an ONNX file"
    tables = {
        "architecture": (spec.architecture, Architecture(), Architecture.__struct_fields__),
        "input": (spec.input, Input(), ("format",)),
        "output": (spec.output, Output(), Output.__struct_fields__),
        "torchscript": (spec.torchscript, TorchScript(), TorchScript.__struct_fields__),
        "onnx": (spec.onnx, Onnx(), ("exporter", "opset")),
        "aoti": (spec.aoti, Aoti(), Aoti.__struct_fields__),
    }
    for name, (table, default, keys) in tables.items():
        for key in keys:
            if (value := getattr(table, key)) != getattr(default, key):
                yield f"{name}.{key}", f"nothing, {reason}, which is used as it is", repr(value)
    for key in ("converter", "prefix", "ema"):
        if value := getattr(spec.weights, key):
            yield f"weights.{key}", f"nothing, {reason}", repr(value)
    for model_format, other in (("torchscript", "TorchScript"), ("aoti", "a program of torch.export")):
        if model_format in spec.formats:
            yield "formats", f"no {model_format}, {reason}, which cannot become {other}", repr(spec.formats)


def _program_mistakes(spec: Spec) -> Iterator[Mistake]:
    """Yield keys that belong to a network in Python, if weights.source is a file of TorchScript or torch.export."""
    reason = "since weights.source contains the network (without `timm` or `network` in [architecture])"
    for key, value in (
        ("architecture.arguments", spec.architecture.arguments),
        ("weights.converter", spec.weights.converter),
        ("weights.prefix", spec.weights.prefix),
        ("weights.ema", spec.weights.ema),
    ):
        if value:
            yield key, f"nothing, {reason}", repr(value)
    if spec.onnx.exporter == "dynamo" and spec.program_suffix != ".pt2":
        yield "onnx.exporter", "auto or torchscript, since the dynamo exporter cannot read TorchScript", "'dynamo'"
    if "aoti" in spec.formats and spec.program_suffix != ".pt2":
        yield "formats", "no aoti, since torch.export cannot read TorchScript", repr(spec.formats)


def _triton_mistakes(model: Model, overrides: Overrides) -> Iterator[Mistake]:
    # msgspec does not check the types in [triton], because most of its keys are Triton's.
    spec, keys = model.spec, model.triton_keys
    if not isinstance(keys.release, str) or not re.fullmatch(RELEASE, keys.release):
        yield "triton.release", 'a release of Triton\'s containers, such as "26.08"', repr(keys.release)
        return
    for model_format in model.served_formats:
        if error := releases.platform_error(keys.release, model_format):
            yield "formats", f"no {model_format}, since {error}", repr(spec.formats)
    if (
        "onnx" in spec.formats
        and isinstance(spec.onnx.opset, int)
        and (support := releases.onnx_support(keys.release))
        and spec.onnx.opset > support.opset
    ):
        newer = releases.oldest_release_for(spec.onnx.opset)
        hint = f", or triton.release = {newer!r} or newer" if newer else ""
        expected = f"at most {support.opset}, the newest opset that Triton {keys.release} reads{hint}"
        yield "onnx.opset", expected, repr(spec.onnx.opset)
    if keys.device not in DEVICES:
        yield "triton.device", f"one of {', '.join(DEVICES)}", with_suggestion(keys.device, DEVICES)
    elif keys.device == "cpu" and "tensorrt" in spec.formats:
        yield "formats", 'no tensorrt, since triton.device = "cpu"', repr(spec.formats)
    if not isinstance(keys.provenance, bool):
        yield "triton.provenance", "bool", repr(keys.provenance)
    counts = (("cores", MAX_CORES), ("warm_up", 65536), ("keep_versions", 1000), ("first_version", 1000))
    for key, most in counts:
        if key == "cores" and "cores" not in spec.triton:
            continue
        if type(count := getattr(keys, key)) is not int or count < 1:
            yield f"triton.{key}", "int >= 1", repr(count)
            return
        if count > most:
            yield f"triton.{key}", f"int <= {most}", repr(count)
            return
    if keys.cores is not None and keys.device != "cpu":
        yield "triton.cores", 'nothing, since it needs triton.device = "cpu"', repr(keys.cores)
    if "warm_up" in spec.triton and (keys.device != "gpu" or "torchscript" not in spec.formats):
        expected = 'nothing, since it needs the format torchscript and triton.device = "gpu"'
        yield "triton.warm_up", expected, repr(keys.warm_up)
    yield from ensemble_checks.mistakes(model, overrides)
    # [triton] is written for every run, so a batch size that an option sets for one run is not compared with it.
    if model.config_fields and isinstance(keys.release, str) and not overrides:
        from build_tasks.spec.serving_facts import facts_of
        from build_tasks.triton import model_config_checks  # loads Triton's protobuf

        for key, expected, found in model_config_checks.mistakes(facts_of(model)):
            yield f"triton.{key}".rstrip("."), expected, found


def _size_mistakes(table: Input) -> Iterator[Mistake]:
    if table.min_size is None and table.max_size is None:
        return
    if table.min_size is None or table.max_size is None:
        yield "input", "both min_size and max_size, or neither", "one of them"
    elif table.shape is None:
        yield "input.shape", "[channels, height, width] to tune for, between min_size and max_size", "nothing"
    elif not all(a <= b <= c for a, b, c in zip(table.min_size, table.shape[1:], table.max_size, strict=True)):
        found = f"{table.min_size}, {table.shape[1:]}, {table.max_size}"
        yield "input", "min_size <= height and width of shape <= max_size", found


def _gate_mistakes(model: Model) -> Iterator[Mistake]:
    accuracy = model.spec.accuracy
    for index, rule in enumerate(accuracy.gate):
        key = f"accuracy.gate[{index}]"
        keys = {name for name, value in table_settings(rule).items() if value is not None}
        if not keys - GATE_SELECTORS:
            limits = ", ".join(sorted(set(rule.__struct_fields__) - GATE_SELECTORS))
            yield key, f"a limit: one of {limits}", "none"
        if rule.format in ONE_PRECISION and rule.precision not in (None, precision := model.precision(rule.format)):
            yield f"{key}.precision", f"{precision}, the precision of {rule.format}", repr(rule.precision)
        if accuracy.truth is None and not {"top1_drop", "top5_drop"}.isdisjoint(keys):
            expected = f"the classes of the samples, since gate[{index}] limits the loss of accuracy"
            yield "accuracy.truth", expected, "nothing"


def type_mistake(error: ValidationError, document: dict[str, Any]) -> str:
    """Return msgspec's error as `key: expected …, found …`, with the most similar valid name.

    Args:
        document: The spec as TOML has it.
    """
    message, _, path = str(error).replace("at `key` in `$", "at `$").partition(" - at `$")
    keys = re.findall(r"\.([\w-]+)|\[(\d+|\.\.\.)\]", path)
    table: type[Struct] = Spec
    found: Any = document
    key = ""
    for name, index in keys:
        if index == "...":  # the key of a dict, which msgspec does not name
            name = next(word for word, value in found.items() if not _fits(value, table))
            found, key = found[name], f"{key}.{name}"
            continue
        found = found[name] if name else found[int(index)]
        key += f".{name}" if name else f"[{index}]"
        table = _table_of(table, name) or table
    key = key.lstrip(".") or "top level"
    if unknown := re.search(r"unknown field `(.+)`", message, re.DOTALL):
        fields = table.__struct_fields__
        return f"{key}: expected one of {listed(fields, MORE)}, found {with_suggestion(unknown[1], fields)}"
    if missing := re.search(r"missing required field `(.+)`", message):
        return f"{key}: expected the key {missing[1]!r}, found nothing"
    named = [name for name, _ in keys if name]
    choices = _choices(get_type_hints(table, include_extras=True).get(named[-1])) if named else []
    if "Invalid enum value" in message or (isinstance(found, float) and any(map(str.isdecimal, choices))):
        return f"{key}: expected one of {', '.join(choices)}, found {_with_choice(found, choices)}"
    if "key` in" in str(error):
        found = ", ".join(found)
    message = message.replace("`", "").replace(END.replace("\\", r"\\"), "$")
    expected = re.sub(r"^Expected |, got .*$| \| null", "", message).replace("object", "table")
    return f"{key}: expected {expected}, found {found!r}"


def _with_choice(found: Any, choices: list[str]) -> str:
    """Return the value that was found with the choice that was meant: a type may be spelled as elsewhere."""
    from build_tasks.spec.tensor_tables import DTYPES, OTHER_SPELLINGS

    if tuple(choices) != DTYPES:
        return with_suggestion(found, choices)
    name = re.sub(r"^(type_|torch\.|np\.|numpy\.|tensorproto\.)", "", str(found).casefold())
    if name in ("bf16", "bfloat16"):
        return f"{found!r}, which NumPy and Triton's clients do not have"
    meant = OTHER_SPELLINGS.get(name, name)
    return f"{found!r} (did you mean {meant!r}?)" if meant in choices else with_suggestion(found, choices)


def _fits(value: Any, table: type[Struct]) -> bool:
    try:
        convert(value, table)
    except ValidationError:
        return False
    return True


def _table_of(table: type[Struct], key: str) -> type[Struct] | None:
    """Return the table, or the element of the list of tables, that a key holds; None if it holds values."""
    hint = get_type_hints(table).get(key)
    return next((t for t in (hint, *get_args(hint)) if isinstance(t, type) and issubclass(t, Struct)), None)


def _choices(hint: Any) -> list[str]:
    """Return the values of the Literal in a type, and "int" if it can also be a number."""
    if getattr(hint, "__origin__", None) is Literal:
        return [str(choice) for choice in get_args(hint)]
    if hint is int:
        return ["int"]
    return list(dict.fromkeys(choice for argument in get_args(hint) for choice in _choices(argument)))
