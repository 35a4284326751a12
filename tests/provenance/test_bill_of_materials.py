"""The bill of materials of each kind of model is valid under CycloneDX's schema, and names what is inside."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from build_tasks.provenance.bill_of_materials import Part, license_of, write_bom
from build_tasks.provenance.statement import Provenance

pytest.importorskip("cyclonedx.validation.json")
CARD = {"license": "MIT", "training_data": "digits", "architecture": "net"}
STEPS: list[Part] = [
    {
        "name": "net_preprocess",
        "files": {"preprocess": None},
        "packages": [["pillow", "13.0.0"]],
        "source": "",
        "license": None,
    },
    {
        "name": "net_onnx",
        "files": {"model.onnx": "a" * 64},
        "packages": [["onnx", "1.23.2"]],
        "source": "hf://team/net/model.safetensors@main",
        "license": "cc-by-nc-4.0",
    },
]


def provenance_of(model_format: str) -> Provenance:
    tensors = [[{"name": name, "dtype": "float32", "shape": [-1, 3]}] for name in ("INPUT__0", "OUTPUT__0")]
    return {
        "build": "b" * 64,
        "weights": "c" * 64,
        "source": "hf://team/net/model.safetensors@main",
        "spec": "d" * 64,
        "code": {},
        "tools": "",
        "packages": [["onnx", "1.23.2"], ["pillow", "13.0.0"]],
        "tensors": tensors,
        "needs": {},
        "parameters": {"model": "net", "format": model_format},
        "gate": [],
        "samples": {},
        "files": {"model.onnx": "a" * 64},
    }


def bom_of(path: Path, model_format: str, parts: list[Part]) -> dict[str, Any]:
    """Write a bill of materials, check it against the schema, and return it."""
    assert write_bom(str(path), "absent", "net", 1, provenance_of(model_format), CARD, parts)
    validator = importlib.import_module("cyclonedx.validation.json").JsonStrictValidator
    version = importlib.import_module("cyclonedx.schema").SchemaVersion.V1_6
    assert validator(version).validate_str(path.read_text()) is None
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def dependencies(bom: dict[str, Any]) -> dict[str, list[str]]:
    return {entry["ref"]: entry.get("dependsOn", []) for entry in bom["dependencies"]}


def test_an_ensemble_consists_of_its_steps(tmp_path: Path) -> None:
    bom = bom_of(tmp_path / "bom", "ensemble", STEPS)
    components = {component["bom-ref"]: component for component in bom["components"]}
    assert "weights" not in components
    step = components["model:net_onnx"]
    assert step["type"] == "machine-learning-model"
    assert step["licenses"] == [{"license": {"id": "CC-BY-NC-4.0"}}]
    assert step["components"][0]["hashes"] == [{"alg": "SHA-256", "content": "a" * 64}]
    found = dependencies(bom)
    assert found["model"] == ["file:model.onnx", "model:net_onnx", "model:net_preprocess"]
    assert found["model:net_onnx"] == ["pkg:pypi/onnx@1.23.2"]
    assert "modelArchitecture" not in bom["metadata"]["component"]["modelCard"]["modelParameters"]


@pytest.mark.parametrize(("model_format", "has_network"), [("onnx", True), ("preprocess", False)])
def test_only_a_network_has_weights_and_training_data(tmp_path: Path, model_format: str, has_network: bool) -> None:
    bom = bom_of(tmp_path / "bom", model_format, [])
    assert ("weights" in dependencies(bom)["model"]) == has_network
    parameters = bom["metadata"]["component"]["modelCard"]["modelParameters"]
    assert ("datasets" in parameters, "modelArchitecture" in parameters) == (has_network, has_network)


def test_a_published_file_of_the_same_content_is_copied(tmp_path: Path) -> None:
    bom_of(tmp_path / "published", "onnx", [])
    text = (tmp_path / "published").read_text().replace('"version": 1', '"version": 2')
    (tmp_path / "published").write_text(text)
    new = provenance_of("onnx")
    write_bom(str(tmp_path / "bom"), str(tmp_path / "published"), "net", 1, new, CARD)
    assert (tmp_path / "bom").read_text() == text
    new["weights"] = "e" * 64
    write_bom(str(tmp_path / "other"), str(tmp_path / "published"), "net", 1, new, CARD)
    assert "e" * 64 in (tmp_path / "other").read_text()


def test_a_license_is_an_identifier_where_the_text_is_unambiguous() -> None:
    assert license_of("onnxscript", None) == "MIT"
    assert license_of("no-such-package", None) is None
