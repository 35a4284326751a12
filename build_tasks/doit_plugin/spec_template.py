"""The text of a new model.toml: keys with values and comments, and other keys that are often set, as comments."""

import json
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from build_tasks.triton.platforms import TRITON_MODELS

# Keys that many users set, by table, with an example where the schema has no default.
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
COMMENT_COLUMN = 36


class Key(NamedTuple):
    """A key of the new spec. The table is "" for a key at the top level."""

    table: str
    name: str
    value: Any
    comment: str = ""


def format_spec(description: str, keys: list[Key], excluded: Collection[str] = ()) -> str:
    """Return the text of a spec.

    Args:
        description: What the spec was made from, for the comment at its head.
        keys: The keys that the spec sets.
        excluded: Keys of OFTEN_SET that make no sense for this model.
    """
    from build_tasks.spec.json_schema import SCHEMA_DIRECTIVE, schema

    full_schema = schema()
    lines = [SCHEMA_DIRECTIVE, f"# {description}. All keys: docs/reference/spec.md"]
    for table, often_set in OFTEN_SET.items():
        table_keys = [key for key in keys if key.table == table]
        optional = often_set.keys() - {*excluded, *(key.name for key in table_keys)}
        lines += ["", f"[{table}]"] if table and (table_keys or optional) else []
        lines += [_format_line(key.name, key.value, key.comment) for key in table_keys]
        properties = _properties(full_schema, table)
        for name in filter(optional.__contains__, often_set):
            value = properties[name]["default"] if often_set[name] is None else often_set[name]
            lines.append(_format_line(f"# {name}", value, properties[name]["description"]))
    return "\n".join(lines) + "\n"


def default_of(name: str) -> Any:
    """Return the default of a key at the top level of a spec."""
    from build_tasks.spec.json_schema import schema

    return _properties(schema(), "")[name]["default"]


def format_document(description: str, document: dict[str, Any]) -> str:
    """Return the text of a spec with all its keys, which is valid TOML. Tables inside tables stand in one line.

    Args:
        description: What the spec was made from, for the comment at its head.
        document: The content, as tomllib returns it.
    """
    from build_tasks.spec.json_schema import SCHEMA_DIRECTIVE

    lines = [SCHEMA_DIRECTIVE, f"# {description}. All keys: docs/reference/spec.md"]
    lines += _format_table("", {key: value for key, value in document.items() if not _holds_tables(value)})
    for name, value in document.items():
        if _holds_tables(value):
            for table in value if isinstance(value, list) else [value]:
                lines += ["", f"[[{name}]]" if isinstance(value, list) else f"[{name}]", *_format_table(name, table)]
    return "\n".join(lines) + "\n"


def _holds_tables(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(each, dict) for each in value))


def _format_table(name: str, table: dict[str, Any]) -> list[str]:
    """Return the lines of a table. The tables of one format in [triton] get a header of their own."""
    inner = {key: value for key, value in table.items() if name == "triton" and key in TRITON_MODELS}
    lines = [f"{_format_key(key)} = {format_value(value)}" for key, value in table.items() if key not in inner]
    for key, value in inner.items():
        lines += ["", f"[{name}.{key}]", *_format_table("", value)]
    return lines


def _properties(full_schema: dict[str, Any], table: str) -> dict[str, Any]:
    """Return the keys of a table in the JSON schema of specs."""
    if table == "triton":
        properties: dict[str, Any] = full_schema["properties"][table]["properties"]
    elif table:
        properties = full_schema["$defs"][table.capitalize()]["properties"]
    else:
        properties = full_schema["properties"]
    return properties


def format_value(value: Any) -> str:
    """Return a value as TOML. Strings, numbers and booleans have the same form in JSON."""
    if isinstance(value, dict):
        items = ", ".join(f"{_format_key(key)} = {format_value(element)}" for key, element in value.items())
        return f"{{ {items} }}" if items else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(format_value, value))}]"
    # JSON's form of characters beyond 16 bits, two escapes, is none of TOML; DEL must be escaped in TOML alone.
    text = json.dumps(value, ensure_ascii=not isinstance(value, str))
    return text.replace("\x7f", "\\u007f")


def _format_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else format_value(key)


def _format_line(name: str, value: Any, comment: str) -> str:
    text = f"{name} = {format_value(value)}"
    return f"{text:<{COMMENT_COLUMN}}  # {comment}" if comment else text
