"""The JSON schema and the reference of the spec: in step with the code, and of one mind with what reads the spec."""

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
from tests.support import spec_cases, specs_served, tiny_network, triton_cases
from tests.support.project import OTHER, ROOT, TINY

SCHEMA = ROOT / "models/model.schema.json"
VALIDATOR = jsonschema.Draft7Validator(json.loads(SCHEMA.read_text()))


def found(spec: str) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(tomllib.loads(spec))]


@pytest.mark.parametrize(
    ("arguments", "path"), [([], "models/model.schema.json"), (["--markdown"], "docs/reference/spec.md")], ids=str
)
def test_they_are_in_step_with_the_code(arguments: list[str], path: str) -> None:
    command = [sys.executable, "-m", "build_tasks.spec.json_schema", *arguments]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    how = " ".join(["python", *command[1:], ">", path])
    assert (ROOT / path).read_text() == made, f"{path} is of another spec.py: {how}"


def test_it_is_a_schema_and_every_key_has_a_description() -> None:
    jsonschema.Draft7Validator.check_schema(VALIDATOR.schema)
    tables = {"": VALIDATOR.schema, **VALIDATOR.schema["$defs"]}
    ours = {name: table for name, table in tables.items() if not name.startswith("Triton")}
    bare = [
        f"{name}.{key}"
        for name, table in ours.items()
        for key, value in table["properties"].items()
        if "$ref" not in value and not value.get("description") and name + key in ours
    ]
    assert bare == []


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("*/model.toml")), ids=lambda path: path.parent.name)
def test_a_shipped_spec_names_the_schema_and_fits_it(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first == SCHEMA_DIRECTIVE
    assert (path.parent / first.removeprefix("#:schema ")).resolve() == SCHEMA
    assert found(path.read_text()) == []


# What JSON cannot tell apart from a number that is fine.
BEYOND_JSON = ("snr = nan", "opset = 11.0")


def is_toml(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True


@pytest.mark.parametrize("text", [text for text, _ in spec_cases.MISTAKES if is_toml(text)])
def test_it_finds_what_the_types_forbid(text: str) -> None:
    try:
        spec = msgspec.convert(tomllib.loads(text), Spec)
    except msgspec.ValidationError:
        assert bool(found(text)) != any(number in text for number in BEYOND_JSON)
    else:
        assert [error for error in found(text) if not error.startswith("$.triton")] == [], spec


def of_triton(top: str, input_table: str, onnx: str, more: str) -> str:
    whole = tiny_network.SPEC.format(engine="", onnx=onnx, input=input_table, formats='"onnx"')
    return f"{top}\n{whole}\n{more}"


SOUND = [
    *(TINY, OTHER),
    *spec_cases.SOUND,
    *(text for text, _ in triton_cases.PLANS.values()),
    *(of_triton(*parts) for parts in specs_served.SPECS.values()),
]


@pytest.mark.parametrize("text", SOUND)
def test_what_is_sound_fits_it(text: str) -> None:
    assert found(text) == []


@pytest.mark.parametrize(
    ("lines", "at"),
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
        ("onnx = { max_batch_size = 0 }", "$.triton.onnx.max_batch_size"),
        ("onnx = { release = '26.08' }", "$.triton.onnx"),
        ("pytorch = {}", "$.triton"),
    ],
)
def test_it_finds_what_tritons_protobuf_has_no_place_for(lines: str, at: str) -> None:
    assert [error.partition(":")[0] for error in found(f"{OTHER}[triton]\n{lines}\n")] == [at]
