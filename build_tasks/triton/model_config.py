"""Fields of Triton's ModelConfig that a spec sets in [triton], checked against the protobuf that Triton reads.

    [triton]                    # for all formats
    instance_group = [{ count = 2 }]
    [triton.onnx]               # for one format; replaces the same field of [triton]
    optimization = { graph = { level = 1 } }

model_config_checks.py checks which fields may be used together.
"""

import functools
import re
from collections.abc import Iterator
from typing import Any

from build_tasks.errors import listed, with_suggestion
from build_tasks.triton.platforms import ENSEMBLE_MODELS, TRITON_MODELS

Mistake = tuple[str, str, str]  # key below triton, what was expected, what was found

SCHEDULERS = {"dynamic_batching", "sequence_batching"}  # Triton accepts one of them

NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,139}"  # of a model of Triton, as this project publishes it

IN_FLIGHT = "max_inflight_requests"  # the field of ensemble_scheduling that [triton.ensemble] may set

WARM_UP_FOLDER, INITIAL_STATE_FOLDER = "warmup", "initial_state"  # in a model's folder

# Fields that follow from the artifact or from other keys of the spec, with a hint on the key.
DERIVED = {
    "name": " (a table of one format can set it)",
    "platform": "", "backend": "", "input": "", "output": "", "default_model_filename": "",
    "max_batch_size": " (set it above the tables, or in the table of one format)",
    "cc_model_filenames": " (use engine.compute_capabilities)",
    "ensemble_scheduling": " (use the key ensemble)",
}  # fmt: skip


@functools.cache
def protobuf() -> Any:
    """Return Triton's protobuf module. It is loaded without its package, which would import gRPC.

    Raises:
        ModuleNotFoundError: If tritonclient is not installed.
    """
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
    """Return the number of a value of an enum of ModelConfig, which is named like "ModelInput.Format"."""
    return int(functools.reduce(getattr, name.split("."), protobuf()).Value(value))


def fields_of_format(config_fields: dict[str, Any], model_format: str) -> dict[str, Any]:
    """Return the fields that the spec sets for one Triton model.

    The fields of [triton] itself do not apply to the parts of an ensemble. A scheduler in the format's own table
    replaces any scheduler of [triton].

    Args:
        config_fields: Fields, and tables of fields by format, as in ServingFacts.
        model_format: A key of TRITON_MODELS.
    """
    own = config_fields.get(model_format, {})
    if model_format in ENSEMBLE_MODELS:
        return dict(own)
    replaced = SCHEDULERS if SCHEDULERS & own.keys() else set()
    common = {
        field: value for field, value in config_fields.items() if field not in TRITON_MODELS and field not in replaced
    }
    return {**common, **own}


def takes_sequences(config_fields: dict[str, Any], model_formats: list[str]) -> bool:
    """Return whether one of some Triton models has a sequence batcher. An ensemble passes sequences on to its steps."""
    fields = [fields_of_format(config_fields, model_format) for model_format in model_formats]
    return any(each.get("sequence_batching", False) is not False for each in fields)


def to_message(fields: dict[str, Any]) -> Any:
    """Return the ModelConfig of some fields.

    Args:
        fields: Values by field, as JSON. The values of `parameters` may be plain values.

    Raises:
        ValueError: If ModelConfig cannot hold a value.
    """
    from google.protobuf import json_format

    try:
        return json_format.ParseDict(with_string_parameters(fields), protobuf().ModelConfig())
    except json_format.ParseError as error:
        raise ValueError(str(error)) from error


def with_string_parameters(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with `parameters` as the protobuf holds them: every value is a string."""
    if not isinstance(fields.get("parameters"), dict):
        return fields
    return {**fields, "parameters": {k: {"string_value": _to_string(v)} for k, v in fields["parameters"].items()}}


def _to_string(value: Any) -> Any:
    if isinstance(value, dict):
        return value.get("string_value", value)
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


def field_mistakes(table: dict[str, Any], model_format: str, own_keys: tuple[str, ...] = ()) -> Iterator[Mistake]:
    """Yield the fields that follow from the artifact, and the values that the protobuf cannot hold.

    Args:
        table: Values by field.
        model_format: The format that the table is for; empty for [triton] itself, which cannot set max_batch_size.
        own_keys: Keys of the table that are no fields of ModelConfig, of which one may have been meant.
    """
    for field, value in table.items():
        if field == "max_batch_size" and model_format:
            if type(value) is not int or value < 0:
                yield field, "int >= 0", repr(value)
        elif field == "name" and model_format:
            if not isinstance(value, str) or not re.fullmatch(NAME, value):
                yield field, "a name of letters, digits, _ and -, which begins with a letter or digit", shorten(value)
        elif field == "ensemble_scheduling" and model_format == "ensemble" and isinstance(value, dict):
            if others := value.keys() - {IN_FLIGHT}:
                expected = f"only {IN_FLIGHT}, since the steps follow from the key ensemble"
                yield field, expected, ", ".join(sorted(others))
            else:
                yield from _message_mistakes(protobuf().ModelEnsembling.DESCRIPTOR, value, field)
        elif field in DERIVED:
            yield field, f"nothing, since it follows from the artifact{DERIVED[field]}", shorten(value)
        elif own_keys and field not in protobuf().ModelConfig.DESCRIPTOR.fields_by_name:
            names = [*own_keys, *settable_fields()]
            yield "", "fields of Triton's ModelConfig", with_suggestion(field, names)
        elif value is not False:
            yield from _message_mistakes(protobuf().ModelConfig.DESCRIPTOR, with_string_parameters({field: value}), "")


def settable_fields() -> list[str]:
    """Return the fields of ModelConfig that a spec can set."""
    return [name for name in protobuf().ModelConfig.DESCRIPTOR.fields_by_name if name not in DERIVED]


def _message_mistakes(descriptor: Any, values: dict[str, Any], path: str) -> Iterator[Mistake]:
    """Yield the values that a message of the protobuf cannot hold. The key is the path of the field."""
    names = [name for name in descriptor.fields_by_name if path or name not in DERIVED]
    for name, value in values.items():
        field = descriptor.fields_by_name.get(name)
        key = f"{path}.{name}".lstrip(".")
        if field is None:
            owner = "Triton's ModelConfig" if not path else f"{descriptor.name}: {listed(names)}"
            yield path, f"fields of {owner}", with_suggestion(name, names)
        elif _is_map(field.message_type):
            yield from _map_mistakes(field.message_type, value, key)
        elif not field.is_repeated:
            yield from _value_mistakes(field, value, key)
        elif isinstance(value, list):
            for index, element in enumerate(value):
                yield from _value_mistakes(field, element, f"{key}[{index}]")
        else:
            yield key, "a list", repr(value)
    for choice in descriptor.oneofs:
        both = [field.name for field in choice.fields if field.name in values]
        if len(both) > 1:
            yield path, f"one of {' and '.join(both)}", "both"


def _map_mistakes(descriptor: Any, table: Any, path: str) -> Iterator[Mistake]:
    if not isinstance(table, dict):
        yield path, "a table", repr(table)
        return
    keys, values = (descriptor.fields_by_name[part] for part in ("key", "value"))
    for key in table:
        typed = int(key) if keys.cpp_type != keys.CPPTYPE_STRING and key.isdecimal() else key
        if expected := _expected_scalar(keys, typed):
            yield path, f"keys that are {expected}", repr(key)
    for key, value in table.items():
        yield from _value_mistakes(values, value, f"{path}.{key}")


def _value_mistakes(field: Any, value: Any, path: str) -> Iterator[Mistake]:
    if field.message_type is not None:
        if isinstance(value, dict):
            yield from _message_mistakes(field.message_type, value, path)
        else:
            yield path, "a table", repr(value)
    elif field.enum_type is not None:
        names = list(field.enum_type.values_by_name)
        if not isinstance(value, str) or value not in names:
            yield path, f"one of {', '.join(names)}", with_suggestion(value, names)
    elif expected := _expected_scalar(field, value):
        yield path, expected, repr(value)


def _is_map(descriptor: Any) -> bool:
    """Return whether a field is a map.

    `has_options` comes first, because GetOptions() loads the protobuf that describes protobufs.

    Args:
        descriptor: Type of the field; None for a scalar.
    """
    return descriptor is not None and descriptor.has_options and descriptor.GetOptions().map_entry


def _expected_scalar(field: Any, value: Any) -> str | None:
    """Return a description of the values that a field accepts; None if it accepts this value."""
    if field.cpp_type == field.CPPTYPE_STRING:
        return None if isinstance(value, str) else "str"
    if field.cpp_type == field.CPPTYPE_BOOL:
        return None if isinstance(value, bool) else "bool"
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return None if type(value) in (int, float) and abs(value) < float("inf") else "a finite float"
    lowest, highest = integer_bounds(field)
    if type(value) is int and lowest <= value <= highest:
        return None
    bits = (highest - lowest).bit_length()
    return f"int{' >= 0' if lowest == 0 else ''}{'' if type(value) is not int else f' of {bits} bits'}"


def integer_bounds(field: Any) -> tuple[int, int]:
    """Return the smallest and the largest value of an integer field of the protobuf."""
    bits = 32 if field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32) else 64
    signed = field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def config_files(fields: dict[str, Any]) -> list[str]:
    """Return the files that the fields of one Triton model name, by their paths in the model's folder.

    They are the data of warm-up requests and of initial states. Source: kWarmupDataFolder and kInitialStateFolder in
    the core's constants.h.

    Args:
        fields: The fields of the Triton model, from fields_of_format.
    """
    samples = fields.get("model_warmup") or ()
    tensors = [tensor for sample in samples for tensor in sample.get("inputs", {}).values()]
    states = (fields.get("sequence_batching") or {}).get("state", ())
    initial = [each for state in states for each in state.get("initial_state", ())]
    return sorted(
        {f"{WARM_UP_FOLDER}/{tensor['input_data_file']}" for tensor in tensors if "input_data_file" in tensor}
        | {f"{INITIAL_STATE_FOLDER}/{each['data_file']}" for each in initial if "data_file" in each}
    )


def shorten(value: object) -> str:
    """Return the repr of a value with at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
