"""[[inputs]], [dimensions] and [[outputs]]: mistakes are one line each, and all tables resolve to one interface."""

import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from build_tasks.errors import UserError
from build_tasks.spec.interface import interface_of
from build_tasks.spec.loader import parse
from build_tasks.spec.model import Spec
from build_tasks.spec.tensor_tables import Dimension, TensorInput, TensorOutput
from build_tasks.tensors import Interface
from tests.support.tensor_cases import IDS, MISTAKES, VALID, tensors


@pytest.fixture(autouse=True)
def network(tmp_path: Path) -> Iterator[None]:
    """The current directory holds the files that the specs name."""
    folder = tmp_path / "models/m"
    folder.mkdir(parents=True)
    (folder / "network.py").touch()
    (folder / "m.onnx").touch()
    before = Path.cwd()
    os.chdir(tmp_path)
    yield
    os.chdir(before)


@pytest.mark.parametrize(("text", "lines"), MISTAKES, ids=[line.partition(": expected")[0] for _, line in MISTAKES])
def test_a_mistake_is_reported_with_the_key_and_what_was_expected_and_found(text: str, lines: str) -> None:
    with pytest.raises(UserError) as error:
        parse("m", text.encode())
    assert str(error.value).replace("models/m/model.toml: ", "") == lines


def test_every_key_has_a_mistake_of_its_own() -> None:
    lines = re.sub(r"puts\[\d\]", "puts[0]", "".join(line for _, line in MISTAKES))
    keys = {f"inputs[0].{key}" for key in TensorInput.__struct_fields__}
    keys |= {f"outputs[0].{key}" for key in TensorOutput.__struct_fields__}
    assert [key for key in sorted(keys) if f"{key}:" not in lines and f"{key}[" not in lines] == []
    assert [key for key in Dimension.__struct_fields__ if key not in lines] == []


@pytest.mark.parametrize("text", VALID)
def test_what_looks_like_a_mistake_can_be_valid(text: str) -> None:
    parse("m", text.encode())


def interface(text: str) -> Interface:
    return interface_of(msgspec.convert(tomllib.loads(text), Spec))


PICTURE = {"layout": "nchw", "low": None, "high": None, "values": None, "batch_dimension": 0}


def test_the_short_form_is_one_picture() -> None:
    sizes = "min_size = [32, 16]\nmax_size = [128, 96]"
    found = interface(tensors(f"[input]\nshape = [3, 64, 48]\n{sizes}"))
    assert found["inputs"] == [{"name": "INPUT__0", "dtype": "float32", "shape": [3, "height", "width"], **PICTURE}]
    assert found["dimensions"] == {
        "height": {"min": 32, "opt": 64, "max": 128},
        "width": {"min": 16, "opt": 48, "max": 96},
    }
    assert (found["outputs"], found["normalization"]) == ([], None)
    found = interface(tensors('[input]\nformat = "uint8_nhwc"\nshape = [1, 8, 9]\nmean = [0.5]'))
    assert found["inputs"] == [{**PICTURE, "name": "INPUT__0", "dtype": "uint8", "shape": [8, 9, 1], "layout": "nhwc"}]
    assert found["normalization"] == {"shape": [1, 8, 9], "mean": [0.5], "std": None, "scale": 1}
    assert interface(tensors(""))["inputs"][0]["shape"] is None  # only timm knows it


def test_names_and_ranges_have_defaults() -> None:
    outputs = '[[outputs]]\nkey = "logits"\n[[outputs]]\nkey = 3\n[[outputs]]\nname = "x"\nclasses = true\n'
    found = interface(tensors(f"{IDS}[[inputs]]\nshape = []\n[dimensions.length]\nmax = 7\n{outputs}"))
    assert [each["name"] for each in found["inputs"]] == ["ids", "INPUT__1"]
    assert found["dimensions"] == {"length": {"min": 1, "opt": 7, "max": 7}}
    assert [(each["name"], each["key"], each["classes"]) for each in found["outputs"]] == [
        ("logits", "logits", False),
        ("OUTPUT__1", 3, False),
        ("x", None, True),
    ]
