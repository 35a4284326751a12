"""[triton] of the spec: the fields of Triton's ModelConfig for each model that is served, by the protobuf it reads.

    [triton]                    # of all formats
    instance_group = [{ count = 2 }]
    [triton.onnx]               # of one of them, in the place of the same field above
    optimization = { graph = { level = 1 } }

What may stand together is in contradictions.py.
"""

import functools
from collections.abc import Iterator
from typing import Any

from build_tasks.errors import with_suggestion
from build_tasks.spec.model import TRITON_KEYS, Model
from build_tasks.triton.platforms import ENSEMBLE_MODELS, FORMATS

Mistake = tuple[str, str, str]  # key below triton, what was expected, what was found

SCHEDULERS = {"dynamic_batching", "sequence_batching"}  # Triton takes one of them

# What follows from the artifact, or from other keys of the spec.
DERIVED = {
    "name": "", "platform": "", "backend": "", "input": "", "output": "", "default_model_filename": "",
    "max_batch_size": " (the key max_batch_size stands above the tables, or in the table of one format)",
    "cc_model_filenames": " (of engine.compute_capabilities)",
    "ensemble_scheduling": " (of the key ensemble)",
}  # fmt: skip


@functools.cache
def protobuf() -> Any:
    """The module of Triton's protobuf, without the package around it, which imports gRPC."""
    import importlib.util

    package = importlib.util.find_spec("tritonclient")
    folders = package.submodule_search_locations if package else None
    if not folders:
        raise ModuleNotFoundError("No module named 'tritonclient'", name="tritonclient")
    path = f"{next(iter(folders))}/grpc/model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def enum(name: str, value: str) -> int:
    """The number of a value of one of ModelConfig's enums, "ModelInput.Format"."""
    return int(functools.reduce(getattr, name.split("."), protobuf()).Value(value))


def fields(model: Model, model_format: str) -> dict[str, Any]:
    """The fields that the spec sets for one model of Triton's; those of [triton] itself are not an ensemble's.

    A scheduler of its own takes the place of any.
    """
    given = model.spec.triton
    apart = {
        *TRITON_KEYS,
        *FORMATS,
        *ENSEMBLE_MODELS,
        *(SCHEDULERS if SCHEDULERS & given.get(model_format, {}).keys() else ()),
    }
    common = (
        {}
        if model_format in ENSEMBLE_MODELS
        else {field: value for field, value in given.items() if field not in apart}
    )
    return {**common, **given.get(model_format, {})}


def message(given: dict[str, Any]) -> Any:
    """The ModelConfig of some fields, whose parameters may be plain values. ValueError for what it cannot hold."""
    from google.protobuf import json_format

    try:
        return json_format.ParseDict(plain(given), protobuf().ModelConfig())
    except json_format.ParseError as error:
        raise ValueError(str(error)) from error


def plain(given: dict[str, Any]) -> dict[str, Any]:
    """With parameters as the protobuf has them, whose values are all strings."""
    if not isinstance(given.get("parameters"), dict):
        return given
    return {**given, "parameters": {k: {"string_value": _string(v)} for k, v in given["parameters"].items()}}


def _string(value: Any) -> Any:
    if isinstance(value, dict):
        return value.get("string_value", value)
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


def structural(table: dict[str, Any], of_one_format: bool) -> Iterator[Mistake]:
    """Fields that follow from the artifact, and what the protobuf does not know."""
    for field, value in table.items():
        if field == "max_batch_size" and of_one_format:
            if type(value) is not int or value < 1:
                yield field, "int >= 1", repr(value)
        elif field in DERIVED:
            yield field, f"nothing, since it follows from the artifact{DERIVED[field]}", short(value)
        elif value is not False:
            yield from _unknown(protobuf().ModelConfig.DESCRIPTOR, plain({field: value}), "")


def _unknown(descriptor: Any, given: dict[str, Any], path: str) -> Iterator[Mistake]:
    """What a message of the protobuf cannot hold, by the path of the field."""
    known = [name for name in descriptor.fields_by_name if path or name not in DERIVED]
    for name, value in given.items():
        field = descriptor.fields_by_name.get(name)
        where = f"{path}.{name}".lstrip(".")
        if field is None:
            what = "Triton's ModelConfig" if not path else f"{descriptor.name}: {', '.join(known)}"
            yield path, f"fields of {what}", with_suggestion(name, known)
            continue
        if _is_map(field.message_type):
            if not isinstance(value, dict):
                yield where, "a table", repr(value)
                continue
            keys, element = (field.message_type.fields_by_name[part] for part in ("key", "value"))
            for key in value:
                typed = int(key) if keys.cpp_type != keys.CPPTYPE_STRING and key.isdecimal() else key
                if expected := _wrong_scalar(keys, typed):
                    yield where, f"keys that are {expected}", repr(key)
            parts: list[tuple[str, Any]] = [(f"{where}.{key}", part) for key, part in value.items()]
        elif field.is_repeated:
            if not isinstance(value, list):
                yield where, "a list", repr(value)
                continue
            element, parts = field, [(f"{where}[{index}]", part) for index, part in enumerate(value)]
        else:
            element, parts = field, [(where, value)]
        for at, part in parts:
            if element.message_type is not None:
                if isinstance(part, dict):
                    yield from _unknown(element.message_type, part, at)
                else:
                    yield at, "a table", repr(part)
            elif element.enum_type is not None:
                if not isinstance(part, str) or part not in element.enum_type.values_by_name:
                    values = list(element.enum_type.values_by_name)
                    yield at, f"one of {', '.join(values)}", with_suggestion(part, values)
            elif expected := _wrong_scalar(element, part):
                yield at, expected, repr(part)
    for choice in descriptor.oneofs:
        both = [field.name for field in choice.fields if field.name in given]
        if len(both) > 1:
            yield path, f"one of {' and '.join(both)}", "both"


def _is_map(descriptor: Any) -> bool:
    """Whether a field of this type, None of a scalar, is a map. To ask for options loads the protobuf of protobufs."""
    return descriptor is not None and descriptor.has_options and descriptor.GetOptions().map_entry


def _wrong_scalar(field: Any, value: Any) -> str | None:
    """What a field takes instead of a value, None where it takes it."""
    if field.cpp_type == field.CPPTYPE_STRING:
        return None if isinstance(value, str) else "str"
    if field.cpp_type == field.CPPTYPE_BOOL:
        return None if isinstance(value, bool) else "bool"
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return None if type(value) in (int, float) and abs(value) < float("inf") else "a finite float"
    lowest, highest = bounds(field)
    if type(value) is int and lowest <= value <= highest:
        return None
    bits = (highest - lowest).bit_length()
    return f"int{' >= 0' if lowest == 0 else ''}{'' if type(value) is not int else f' of {bits} bits'}"


def bounds(field: Any) -> tuple[int, int]:
    """The smallest and the largest number that an integer field of the protobuf holds."""
    bits = 32 if field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32) else 64
    signed = field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def warm_up_file(model: Model, file: str) -> str:
    """Where the spec's own data for warming up lie; Triton looks for them in the model's folder, under warmup/."""
    return model.source(f"warmup/{file}")


def warm_up_files(model: Model, model_format: str) -> list[str]:
    """The names of the files that the warm-ups of a model of Triton's read."""
    samples = fields(model, model_format).get("model_warmup") or ()
    tensors = [tensor for sample in samples for tensor in sample.get("inputs", {}).values()]
    return sorted({tensor["input_data_file"] for tensor in tensors if "input_data_file" in tensor})


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
