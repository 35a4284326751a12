"""Every key of the schema: a value of a wrong type, and a name that is misspelt, are one line each."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from build_tasks.doit_plugin.spec_template import format_document
from build_tasks.errors import UserError
from build_tasks.spec.loader import parse
from tests.support.project import ROOT

SCHEMA = json.loads((ROOT / "models/model.schema.json").read_text())
BASE: dict[str, Any] = {
    "formats": ["onnx", "tensorrt"],
    "architecture": {"network": "network.py:build"},
    "weights": {"source": "random://0"},
    "inputs": [{"shape": ["length"]}],
    "dimensions": {"length": {"max": 8}},
    "outputs": [{"key": 0}],
    "ensemble": {"steps": [{"model": "m_onnx"}]},
    "accuracy": {"gate": [{"relative_l2": 0.1}]},
    "engine": {"profiles": [{"dimensions": {"length": {"max": 8}}}]},
}
TABLES = {  # definition of the schema: where its keys stand
    "": (),
    "TensorInput": ("inputs", 0),
    "Dimension": ("dimensions", "length"),
    "TensorOutput": ("outputs", 0),
    "Ensemble": ("ensemble",),
    "EnsembleStep": ("ensemble", "steps", 0),
    "Gate": ("accuracy", "gate", 0),
    "Profile": ("engine", "profiles", 0),
    "ProfileDimension": ("engine", "profiles", 0, "dimensions", "length"),
    **{name.capitalize(): (name,) for name in ("architecture", "weights", "input", "output", "onnx", "aoti", "engine")},
    **{"Accuracy": ("accuracy",), "Card": ("card",), "TorchScript": ("torchscript",)},
}
WRONG_VALUES: tuple[Any, ...] = (1.5, "\N{BULLET}", {"a": 1}, [True])


def tables() -> Iterator[tuple[str, tuple[str | int, ...], dict[str, Any]]]:
    for name, place in TABLES.items():
        yield name, place, (SCHEMA["$defs"][name] if name else SCHEMA)["properties"]


KEYS = [(place, key, properties) for _, place, properties in tables() for key in properties]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/m").mkdir(parents=True)
    (tmp_path / "models/m/network.py").touch()


def test_all_tables_of_a_spec_are_known_here() -> None:
    own = {name for name in SCHEMA["$defs"] if not name.startswith("Triton.")}
    assert own == {*TABLES} - {""}


def mistakes(place: tuple[str | int, ...], key: str, value: Any) -> list[str]:
    """Return the lines about a spec in which a key has this value."""
    document = copy.deepcopy(BASE)
    table: Any = document
    for step in place:
        table = table.setdefault(step, {}) if isinstance(step, str) else table[step]
    table[key] = value
    with pytest.raises(UserError) as error:
        parse("m", format_document("a test", document).encode())
    return str(error.value).split("\n")


def wrong_value(schema: dict[str, Any]) -> Any:
    validator = jsonschema.Draft7Validator({**schema, "$defs": SCHEMA["$defs"]})
    return next(value for value in WRONG_VALUES if not validator.is_valid(value))


def name_of(place: tuple[str | int, ...]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).lstrip(".")


@pytest.mark.parametrize(("place", "key", "properties"), KEYS, ids=[f"{name_of(row[0])}.{row[1]}" for row in KEYS])
def test_a_wrong_type_and_a_misspelt_name_are_one_line(
    place: tuple[str | int, ...], key: str, properties: dict[str, Any]
) -> None:
    wrong = wrong_value(properties[key])
    [line] = mistakes(place, key, wrong)
    path = f"{name_of(place)}.{key}".lstrip(".")
    assert line.startswith(f"models/m/model.toml: {path}")
    assert ": expected " in line
    assert ", found " in line
    [line] = mistakes(place, f"{key}{key[-1]}", wrong)
    assert line.startswith(f"models/m/model.toml: {name_of(place) or 'top level'}: expected one of ")
    assert line.endswith(f", found {key + key[-1]!r} (did you mean {key!r}?)")


TRITON = {key: value for key, value in SCHEMA["properties"]["triton"]["properties"].items() if "$ref" not in value}


@pytest.mark.parametrize("key", [key for key in TRITON if TRITON[key].get("type") != "object"])
def test_the_same_holds_for_triton(key: str) -> None:
    wrong = wrong_value(TRITON[key])
    lines = mistakes(("triton",), key, wrong)
    assert all(line.startswith(f"models/m/model.toml: triton.{key}") and ": expected " in line for line in lines)
    [line] = mistakes(("triton",), f"{key}{key[-1]}", wrong)
    assert f"(did you mean {key!r}?)" in line
