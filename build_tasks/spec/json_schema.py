"""The JSON schema of model.toml for editors, and the reference of its keys for people.

    python -m build_tasks.spec.json_schema > models/model.schema.json
    python -m build_tasks.spec.json_schema --markdown > docs/reference/spec.md

msgspec derives types, defaults and descriptions from the classes of tables.py and model.py. The fields of Triton's
ModelConfig come from its protobuf. Editors find the schema through the first line of a spec.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import msgspec

from build_tasks.spec.model import Spec
from build_tasks.spec.tables import TritonKeys
from build_tasks.triton import model_config, platforms

Schema = dict[str, Any]

SCHEMA_DIRECTIVE = "#:schema ../model.schema.json"  # first line of a spec; taplo and editors based on it read it
TITLE = "models/<model>/model.toml"
DRAFT = "http://json-schema.org/draft-07/schema#"  # the newest draft that TOML editors support everywhere
PROTOBUF = "https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto"

NAME_OF_FORMAT: Schema = {
    "type": "string",
    "pattern": f"^{model_config.NAME}$",
    "description": "Name of the Triton model of this format. Default: the name of the model and a suffix.",
}
MAX_BATCH_OF_FORMAT: Schema = {
    "type": "integer",
    "minimum": 0,
    "description": "Largest batch of this format. Replaces the key max_batch_size above the tables.",
}


def schema() -> Schema:
    """Return the JSON schema of a spec, with a description of every key."""
    definitions = _definitions(Spec)
    spec = definitions.pop("Spec")
    (formats,) = (f for f in msgspec.structs.fields(Spec) if f.name == "formats")
    spec["properties"]["formats"]["default"] = formats.default_factory()
    spec["properties"]["triton"] |= _triton(definitions)
    return {"$schema": DRAFT, "title": TITLE, **spec, "$defs": dict(sorted(definitions.items()))}


def _definitions(table: type[msgspec.Struct]) -> dict[str, Schema]:
    """Return msgspec's schema of a table and of all tables in it, by name."""
    definitions: dict[str, Schema] = msgspec.json.schema(table)["$defs"]
    for definition in definitions.values():
        del definition["title"]
        for key, of in definition["properties"].items():
            definition["properties"][key] = _without_null(of)
    return definitions


def _without_null(of: Schema) -> Schema:
    """Return the schema of a key without null, which TOML does not have."""
    if of.get("default", ...) is None:
        del of["default"]
    choices = [choice for choice in of.pop("anyOf", ()) if choice != {"type": "null"}]
    if len(choices) > 1:
        return {**of, "anyOf": choices}
    return {**of, **choices[0]} if choices else of


def _triton(definitions: dict[str, Schema]) -> Schema:
    """Return the schema of [triton]: the project's keys, fields of ModelConfig, and a table of fields by format."""
    fields = _fields(definitions)
    definitions["Triton.format"] = {
        "type": "object",
        "description": "Fields of one of the Triton models. They replace the same fields of [triton].",
        "properties": {"name": NAME_OF_FORMAT, "max_batch_size": MAX_BATCH_OF_FORMAT, **fields},
        "additionalProperties": False,
    }
    tables = {name: {"$ref": "#/$defs/Triton.format"} for name in platforms.TRITON_MODELS}
    keys = _definitions(TritonKeys)["TritonKeys"]["properties"]
    return {"type": "object", "properties": {**keys, **fields, **tables}, "additionalProperties": False}


def _fields(definitions: dict[str, Schema]) -> dict[str, Schema]:
    """Return the schemas of the fields of ModelConfig that a spec can set. `false` removes a default."""
    descriptor = model_config.protobuf().ModelConfig.DESCRIPTOR
    fields = {f.name: _field(f, definitions) for f in descriptor.fields if f.name not in model_config.DERIVED}
    fields["parameters"] = {
        "type": "object",
        "additionalProperties": {"type": ["string", "boolean", "number", "object"]},
    }
    return {name: {"anyOf": [of, {"const": False}]} for name, of in fields.items()}


def _field(field: Any, definitions: dict[str, Schema]) -> Schema:
    """Return the schema of a field of the protobuf. The messages in it are added to the definitions."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        values = _field(field.message_type.fields_by_name["value"], definitions)
        return {"type": "object", "additionalProperties": values}
    one = _value(field, definitions)
    return {"type": "array", "items": one} if field.is_repeated else one


def _value(field: Any, definitions: dict[str, Schema]) -> Schema:
    if field.enum_type is not None:
        return {"enum": list(field.enum_type.values_by_name)}
    if field.message_type is not None:
        name = f"Triton.{field.message_type.full_name.partition('.')[2]}"
        if name not in definitions:
            definitions[name] = {"type": "object", "additionalProperties": False}
            definitions[name]["properties"] = {f.name: _field(f, definitions) for f in field.message_type.fields}
        return {"$ref": f"#/$defs/{name}"}
    plain = {
        field.CPPTYPE_STRING: "string",
        field.CPPTYPE_BOOL: "boolean",
        field.CPPTYPE_FLOAT: "number",
        field.CPPTYPE_DOUBLE: "number",
    }
    if field.cpp_type in plain:
        return {"type": plain[field.cpp_type]}
    lowest, highest = model_config.integer_bounds(field)
    return {"type": "integer", "minimum": lowest, "maximum": highest}


PAGE_HEAD = """\
# All keys of `models/<model>/model.toml`

This page is generated from `build_tasks/spec/`, do not edit it:
`python -m build_tasks.spec.json_schema --markdown > docs/reference/spec.md`.
Editors that support JSON schemas for TOML show the same texts if the spec begins with `{directive}`.
"""
TRITON_HEAD = """
`[triton]` can also hold any field of Triton's [ModelConfig]({protobuf}), under its own name.
A field in `[triton]` is for all formats, a field in `[triton.<format>]` ({formats}) is for one of them.
`false` removes a default. These fields cannot be set, since they follow from the artifact:
{derived}.

| field | type |
|---|---|
"""


def markdown() -> str:
    """Return the reference page: a table of keys for each table of a spec."""
    page = schema()
    definitions = page["$defs"]
    parts = [PAGE_HEAD.format(directive=SCHEMA_DIRECTIVE), _table("", page)]
    for key, of in page["properties"].items():
        if key == "triton":
            parts.append(_triton_reference(of, definitions))
        elif "$ref" in of.get("items", {}):
            parts.append(_table(f"[[{key}]]", definitions[of["items"]["$ref"].rpartition("/")[2]]))
        elif "$ref" in of.get("additionalProperties", {}):
            element = definitions[of["additionalProperties"]["$ref"].rpartition("/")[2]]
            parts.append(_table(f"[{key}.WORD]", element))
        elif ref := next((each["$ref"] for each in (of, *of.get("anyOf", ())) if "$ref" in each), None):
            table = definitions[ref.rpartition("/")[2]]
            parts.append(_table(f"[{key}]", table))
            parts += _inner_tables(key, table, definitions)
    return "\n".join(parts)


def _inner_tables(key: str, of: Schema, definitions: dict[str, Schema]) -> Iterator[str]:
    """Yield the tables below a table: [[engine.profiles]], [engine.profiles.dimensions.WORD]."""
    for inner, value in of["properties"].items():
        headings = {"items": f"[[{key}.{inner}]]", "additionalProperties": f"[{key}.{inner}.WORD]"}
        for holder, heading in headings.items():
            if isinstance(held := value.get(holder), dict) and "$ref" in held:
                element = definitions[held["$ref"].rpartition("/")[2]]
                yield _table(heading, element)
                yield from _inner_tables(f"{key}.{inner}", element, definitions)


def _table(heading: str, of: Schema) -> str:
    rows = [
        f"| `{key}` | {_type(value)} | {_default(key, value, of)} | {_cell(value.get('description', ''))} |"
        for key, value in of["properties"].items()
        if "$ref" not in value and key != "triton"
    ]
    title = f"## `{heading}`" if heading else "## Above all tables"
    table = "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])
    return f"{title}\n\n{of['description']}\n\n{table}\n"


def _triton_reference(of: Schema, definitions: dict[str, Schema]) -> str:
    keys = {key: of["properties"][key] for key in TritonKeys.__struct_fields__}
    text = TRITON_HEAD.format(
        protobuf=PROTOBUF,
        formats=", ".join(platforms.TRITON_MODELS),
        derived=", ".join(f"`{field}`{_cell(hint)}" for field, hint in model_config.DERIVED.items()),
    )
    fields = definitions["Triton.format"]["properties"]
    rows = [f"| `{key}` | {_type(value['anyOf'][0])} |\n" for key, value in fields.items() if "anyOf" in value]
    return _table("[triton]", {**of, "properties": keys}) + text + "".join(rows)


def _default(key: str, value: Schema, of: Schema) -> str:
    if key in of.get("required", ()):
        return "required"
    default = value.get("default")
    return "" if default is None else f"`{json.dumps(default)}`" if default != {} else "`{}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _type(of: Schema) -> str:
    """Return a type in a few words: choices, bounds, what a list holds."""
    if "anyOf" in of:
        return " or ".join(map(_type, of["anyOf"]))
    if "enum" in of:
        return ", ".join(f"`{choice}`" for choice in of["enum"])
    if "$ref" in of:
        return f"table {of['$ref'].rpartition('/')[2].removeprefix('Triton.')}"
    if of["type"] == "array":
        count = f"{of['maxItems']} x " if of.get("maxItems") else ""
        return f"list of {count}{_type(of['items'])}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {of[key]:g}" for key, sign in signs.items() if abs(of.get(key, 2**31)) < 2**31 - 1]
    name = {"object": "table", "number": "float"}.get(of["type"], str(of["type"]))
    return " ".join([name, *bounds])


if __name__ == "__main__":
    if sys.argv[1:] == ["--markdown"]:
        sys.stdout.write(markdown())
    else:
        sys.stdout.write(json.dumps(schema(), indent=1) + "\n")
