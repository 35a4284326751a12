"""The JSON schema and the reference page of a spec match the code, and the schema accepts what the loader accepts."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import msgspec
import pytest

from build_tasks.spec.json_schema import SCHEMA_DIRECTIVE
from build_tasks.spec.model import Spec
from tests.support import spec_cases, specs_served, tensor_cases, tiny_network, triton_cases
from tests.support.project import OTHER, ROOT, TINY

SCHEMA = ROOT / "models/model.schema.json"
VALIDATOR = jsonschema.Draft7Validator(json.loads(SCHEMA.read_text()))


def schema_errors(spec: str) -> list[str]:
    """Return the errors of a spec that a validator of JSON schemas finds, with their paths."""
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(tomllib.loads(spec))]


@pytest.mark.parametrize(
    ("arguments", "path"), [([], "models/model.schema.json"), (["--markdown"], "docs/reference/spec.md")], ids=str
)
def test_generated_files_match_the_code(arguments: list[str], path: str) -> None:
    command = [sys.executable, "-m", "build_tasks.spec.json_schema", *arguments]
    generated = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    fix = " ".join(["python", *command[1:], ">", path])
    assert (ROOT / path).read_text() == generated, f"{path} is outdated, run: {fix}"


def test_the_schema_is_valid_and_every_key_has_a_description() -> None:
    jsonschema.Draft7Validator.check_schema(VALIDATOR.schema)
    tables = {"": VALIDATOR.schema, **VALIDATOR.schema["$defs"]}
    spec_tables = {name: table for name, table in tables.items() if not name.startswith("Triton.")}
    undescribed = [
        f"{name}.{key}"
        for name, table in spec_tables.items()
        for key, value in table["properties"].items()
        if "$ref" not in value and not value.get("description")
    ]
    assert undescribed == []


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("*/model.toml")), ids=lambda path: path.parent.name)
def test_a_shipped_spec_names_the_schema_and_matches_it(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first == SCHEMA_DIRECTIVE
    assert (path.parent / first.removeprefix("#:schema ")).resolve() == SCHEMA
    assert schema_errors(path.read_text()) == []


# Numbers that JSON cannot tell from a valid number.
BEYOND_JSON = ("snr = nan", "opset = 11.0", "low = nan", "high = inf")


def is_toml(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True


@pytest.mark.parametrize("text", [text for text, _ in [*spec_cases.MISTAKES, *tensor_cases.MISTAKES] if is_toml(text)])
def test_the_schema_refuses_what_the_types_refuse(text: str) -> None:
    try:
        spec = msgspec.convert(tomllib.loads(text), Spec)
    except msgspec.ValidationError:
        assert bool(schema_errors(text)) != any(number in text for number in BEYOND_JSON)
    else:
        assert [error for error in schema_errors(text) if not error.startswith("$.triton")] == [], spec


def served_spec(top: str, input_table: str, onnx: str, more: str) -> str:
    spec = tiny_network.SPEC.format(engine="", onnx=onnx, input=input_table, formats='"onnx"')
    return f"{top}\n{spec}\n{more}"


VALID = [
    *(TINY, OTHER),
    *spec_cases.VALID,
    *tensor_cases.VALID,
    *(text for text, _ in triton_cases.PLANS.values()),
    *(served_spec(*parts) for parts in specs_served.SPECS.values()),
]


@pytest.mark.parametrize("text", VALID)
def test_the_schema_accepts_valid_specs(text: str) -> None:
    assert schema_errors(text) == []


@pytest.mark.parametrize(
    ("lines", "path"),
    [
        ("dynamic_batchin = {}", "$.triton"),
        ("instance_group = [{ kind = 'KIND_GPUS' }]", "$.triton.instance_group"),
        ("instance_group = { count = 2 }", "$.triton.instance_group"),
        ("dynamic_batching = { preferred_batch_size = ['4'] }", "$.triton.dynamic_batching"),
        ("release = '2608'", "$.triton.release"),
        ("device = 'GPU'", "$.triton.device"),
        ("keep_versions = 0", "$.triton.keep_versions"),
        ("provenance = 'no'", "$.triton.provenance"),
        ("platform = 'onnxruntime_onnx'", "$.triton"),
        ("max_batch_size = 8", "$.triton"),
        ("onnx = { max_batch_size = -1 }", "$.triton.onnx.max_batch_size"),
        ("onnx = { release = '26.08' }", "$.triton.onnx"),
        ("pytorch = {}", "$.triton"),
    ],
)
def test_the_schema_refuses_what_tritons_protobuf_cannot_hold(lines: str, path: str) -> None:
    assert [error.partition(":")[0] for error in schema_errors(f"{OTHER}[triton]\n{lines}\n")] == [path]
