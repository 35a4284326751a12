"""JSON files have the bytes that Python's json writes with an indent of one."""

import json
from pathlib import Path

import pytest

from build_tasks.json_files import read_json, write_json


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        "text",
        -0.0,
        None,
        [[], {}, [[]], [{}], {"a": []}],
        {"b": {"a": [1, 2.5, True, None]}, "a": {"": {"": [[1], [2]]}}},
        [1e-05, 1.4e-06, 1e22, 1e300, 5e-324, 0.1 + 0.2, 10**30, -(2**63), 3.0],
        {'"quoted", {not} [nested]: \\': "a\tb\n\r\0\x1f\x7f/", "é\u2028": "\N{GRINNING FACE}", "alone": "\ud800"},
        {1: 2, None: (3, 4)},
    ],
)
def test_a_value_gives_the_bytes_of_json(value: object, tmp_path: Path) -> None:
    write_json(str(tmp_path / "value.json"), value)
    assert (tmp_path / "value.json").read_bytes() == json.dumps(value, indent=1).encode()
    assert read_json(str(tmp_path / "value.json")) == json.loads(json.dumps(value))


@pytest.mark.parametrize("value", [float("nan"), {"x": [float("inf")]}])
def test_what_json_does_not_have_is_refused(value: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(str(tmp_path / "value.json"), value)
