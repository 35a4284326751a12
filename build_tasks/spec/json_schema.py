"""What editors and people are told of model.toml: a JSON schema and a reference, both made from spec.py itself.

    python -m build_tasks.spec.json_schema > models/model.schema.json
    python -m build_tasks.spec.json_schema --markdown > docs/reference/spec.md

Types and defaults are those of the classes, the meaning of a key is the comment behind it, and the fields of Triton's
ModelConfig are those of its protobuf. Editors find the schema by the first line of a spec.
"""

import ast
import inspect
import io
import json
import sys
import tokenize
from typing import Any

import msgspec

from build_tasks.spec import loader, model
from build_tasks.triton import model_config, platforms

Schema = dict[str, Any]

LINE = "#:schema ../model.schema.json"  # how a spec begins, for editors that know taplo's directives
TITLE = "models/<model>/model.toml"
DRAFT = "http://json-schema.org/draft-07/schema#"  # the newest that editors of TOML are sure to know
PROTOBUF = "https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto"

# What of [triton] the types of spec.py leave open.
TRITON_TYPES: dict[str, Schema] = {
    "release": {"type": "string", "pattern": f"^{loader.RELEASE}$"},
    "device": {"enum": list(loader.DEVICES)},
    "warm_up": {"type": "integer", "minimum": 1},
    "keep_versions": {"type": "integer", "minimum": 1},
    "provenance": {"type": "boolean"},
}
OF_ONE_FORMAT: Schema = {
    "type": "integer",
    "minimum": 1,
    "description": "the largest batch of this format, in the place of the key above the tables",
}


def schema() -> Schema:
    """The JSON schema of a spec, with a description of every key."""
    made = msgspec.json.schema(model.Spec)
    known, definitions = comments(), made["$defs"]
    for table, definition in definitions.items():
        definition.pop("title")
        for key, of in definition["properties"].items():
            definition["properties"][key] = _described(_without_null(of), known.get((table, key)))
    whole = definitions.pop("Spec")
    (formats,) = (f for f in msgspec.structs.fields(model.Spec) if f.name == "formats")
    whole["properties"]["formats"]["default"] = formats.default_factory()
    whole["properties"]["triton"] = _triton(definitions, known)
    return {"$schema": DRAFT, "title": TITLE, **whole, "$defs": dict(sorted(definitions.items()))}


def _described(of: Schema, text: str | None) -> Schema:
    """A table is described where it is defined: what stands beside a reference does not count."""
    return of if text is None or "$ref" in of else {"description": text, **of}


def _without_null(of: Schema) -> Schema:
    """TOML has no null: a key that may be missing is left out."""
    if of.get("default", ...) is None:
        del of["default"]
    choices = [choice for choice in of.pop("anyOf", ()) if choice != {"type": "null"}]
    return {**choices[0], **of} if choices else of


def comments() -> dict[tuple[str, str], str]:
    """What stands behind each key in spec.py, by class (or TRITON_KEYS) and key.

    A comment on a line of its own is about all keys below it, up to the next one.
    """
    source = inspect.getsource(model)
    behind: dict[int, str] = {}
    above: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            place = above if token.line.lstrip().startswith("#") else behind
            place[token.start[0]] = token.string.removeprefix("#").strip()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            group = ""
            for part in node.body:
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    group = above.get(part.lineno - 1, group)
                    text = behind.get(part.lineno, "")
                    found[node.name, part.target.id] = f"{text} ({group})" if group else text
        elif isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict):
            for key in node.value.keys:
                if isinstance(key, ast.Constant) and key.lineno in behind:
                    found["TRITON_KEYS", str(key.value)] = behind[key.lineno]
    return found


def _triton(definitions: dict[str, Schema], known: dict[tuple[str, str], str]) -> Schema:
    """[triton]: its own keys, the fields of ModelConfig, and a table of such fields for each of Triton's models."""
    fields = _fields(definitions)
    own = {
        key: {"description": known["TRITON_KEYS", key], **TRITON_TYPES[key], "default": default}
        for key, default in model.TRITON_KEYS.items()
    }
    definitions["Triton.format"] = {
        "type": "object",
        "description": "Fields for one of Triton's models, in the place of the same ones of [triton].",
        "properties": {"max_batch_size": OF_ONE_FORMAT, **fields},
        "additionalProperties": False,
    }
    tables = {name: {"$ref": "#/$defs/Triton.format"} for name in platforms.TRITON_MODELS}
    return {
        "type": "object",
        "description": known["Spec", "triton"],
        "properties": {**own, **fields, **tables},
        "additionalProperties": False,
    }


def _fields(definitions: dict[str, Schema]) -> dict[str, Schema]:
    """The fields of ModelConfig that a spec may set; `false` leaves a default out."""
    descriptor = model_config.protobuf().ModelConfig.DESCRIPTOR
    fields = {f.name: _field(f, definitions) for f in descriptor.fields if f.name not in model_config.DERIVED}
    fields["parameters"] = {
        "type": "object",
        "additionalProperties": {"type": ["string", "boolean", "number", "object"]},
    }
    return {name: {"anyOf": [of, {"const": False}]} for name, of in fields.items()}


def _field(field: Any, definitions: dict[str, Schema]) -> Schema:
    """A field of the protobuf as JSON; the messages that it holds are added to the definitions."""
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


HEAD = """\
# All keys of `models/<model>/model.toml`

This page is generated from `build_tasks/spec/model.py`, do not edit it:
`python -m build_tasks.spec.json_schema --markdown > docs/reference/spec.md`.
Editors that know JSON schemas of TOML files show the same: a spec begins with `{line}`.
"""
TRITON_HEAD = """
Any field of Triton's [ModelConfig]({protobuf}),
under its own name, here for all formats, and in `[triton.<format>]` ({formats})
for one of them; `false` leaves a default out. What follows from the artifact cannot be set:
{derived}.

| field | type |
|---|---|
"""


def markdown() -> str:
    """The reference: a table of keys for each table of a spec."""
    made = schema()
    definitions = made["$defs"]
    parts = [HEAD.format(line=LINE), _table("", made)]
    for key, of in made["properties"].items():
        if key == "triton":
            parts.append(_triton_reference(of, definitions))
        elif "$ref" in of:
            table = definitions[of["$ref"].rpartition("/")[2]]
            parts.append(_table(f"[{key}]", table))
            for inner, other in table["properties"].items():
                if "$ref" in other.get("items", {}):
                    rows = definitions[other["items"]["$ref"].rpartition("/")[2]]
                    parts.append(_table(f"[[{key}.{inner}]]", rows))
    return "\n".join(parts)


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
    fields = definitions["Triton.format"]["properties"]
    own = {
        "description": "What Triton is told of the model.",
        "properties": {k: of["properties"][k] for k in TRITON_TYPES},
    }
    text = TRITON_HEAD.format(
        protobuf=PROTOBUF,
        formats=", ".join(platforms.TRITON_MODELS),
        derived=", ".join(f"`{field}`{_cell(why)}" for field, why in model_config.DERIVED.items()),
    )
    rows = [f"| `{key}` | {_type(value['anyOf'][0])} |\n" for key, value in fields.items() if "anyOf" in value]
    return _table("[triton]", own) + text + "".join(rows)


def _default(key: str, value: Schema, of: Schema) -> str:
    if key in of.get("required", ()):
        return "required"
    default = value.get("default")
    return "" if default is None else f"`{json.dumps(default)}`" if default != {} else "`{}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _type(of: Schema) -> str:
    """A type in a few words: choices, bounds, what a list holds."""
    if "enum" in of:
        return ", ".join(f"`{choice}`" for choice in of["enum"])
    if "$ref" in of:
        return f"table {of['$ref'].rpartition('/')[2].removeprefix('Triton.')}"
    if of["type"] == "array":
        count = f"{of['maxItems']} x " if of.get("maxItems") else ""
        return f"list of {count}{_type(of['items'])}"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    told = [f"{sign} {of[bound]:g}" for bound, sign in bounds.items() if abs(of.get(bound, 2**31)) < 2**31 - 1]
    name = {"object": "table", "number": "float"}.get(of["type"], str(of["type"]))
    return " ".join([name, *told])


if __name__ == "__main__":
    if sys.argv[1:] == ["--markdown"]:
        sys.stdout.write(markdown())
    else:
        sys.stdout.write(json.dumps(schema(), indent=1) + "\n")
