"""A ModelConfig as plain data: the fields that a spec can set, and a comparison of two configs field by field."""

from collections.abc import Iterator
from typing import Any

from build_tasks.triton import model_config
from build_tasks.triton.platforms import FORMATS, TRITON_MODELS


def to_fields(message: Any) -> dict[str, Any]:
    """Return the fields of a message that are set, as [triton] of a spec has them; the inverse of to_message.

    Integers of 64 bits stay integers, and enums become names. The values of `parameters` become strings.
    """
    return {field.name: _plain(field, value) for field, value in message.ListFields()}


def _plain(field: Any, value: Any) -> Any:
    descriptor = field.message_type
    if descriptor is not None and descriptor.GetOptions().map_entry:
        values = descriptor.fields_by_name["value"]
        if field.name == "parameters" and field.containing_type.name == "ModelConfig":
            return {str(key): element.string_value for key, element in sorted(value.items())}
        return {str(key): _scalar(values, element) for key, element in sorted(value.items())}
    if field.is_repeated:
        return [_scalar(field, element) for element in value]
    return _scalar(field, value)


def _scalar(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return to_fields(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known else value  # a number that the enum does not have, which its checks refuse
    return value


def normalized(config: Any, name: str, model_format: str) -> Any:
    """Return a copy of a ModelConfig with what Triton fills in when it loads the model.

    Source: GetNormalizedModelConfig and AutoCompleteBackendFields in the core's model_config_utils.cc.
    """
    copy = model_config.protobuf().ModelConfig()
    copy.CopyFrom(config)
    platform = TRITON_MODELS[model_format]
    copy.name, copy.platform = name, platform.platform
    if model_format in FORMATS:
        copy.backend = platform.platform.partition("_")[0]
        copy.default_model_filename = copy.default_model_filename or platform.file
    if copy.version_policy.WhichOneof("policy_choice") is None:
        copy.version_policy.latest.num_versions = 1
    return copy


def differences(before: Any, after: Any) -> Iterator[tuple[str, str, str]]:
    """Yield (path, value before, value after) of every field that is set in one of two ModelConfigs.

    An empty value says that the field is not set. The elements of lists of tables are named by their name if they have
    one: "input.images.dims".
    """
    rows, others = dict(_flat(to_fields(before))), dict(_flat(to_fields(after)))
    for path in dict.fromkeys([*rows, *others]):
        yield path, rows.get(path, ""), others.get(path, "")


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, element in value.items():
            yield from _flat(element, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list) and any(isinstance(element, dict) for element in value):
        for index, element in enumerate(value):
            name = next((element[key] for key in ("name", "input_name", "model_name") if key in element), str(index))
            yield from _flat({key: part for key, part in element.items() if key != "name"}, f"{path}.{name}")
    else:
        yield path, str(value)
