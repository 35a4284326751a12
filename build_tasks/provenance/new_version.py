"""A new version of a published model: its files, and its provenance."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from build_tasks.json_files import read_json, write_json
from build_tasks.paths import REPOSITORY
from build_tasks.provenance import statement
from build_tasks.provenance.bill_of_materials import BOM_FILE, Part, write_bom
from build_tasks.provenance.statement import Provenance, file_digests
from build_tasks.runtime import repository_files
from build_tasks.runtime.digests import digest
from build_tasks.runtime.stage import Paths, Settings
from build_tasks.triton.platforms import FORMATS
from build_tasks.triton.repository import CONFIG_FILE, PROVENANCE_FILE, block_bytecode
from build_tasks.verification import gate

if TYPE_CHECKING:
    from build_tasks.tensors import Signature

PACKAGE_NAME = re.compile("[a-z0-9][a-z0-9._-]*")  # a tool that is a Python package, and no fact about a GPU
COMPILED_PROPERTIES = {"tensorrt": ("profiles", "TensorRT", "version_compatible"), "aoti": ("profiles", "device")}


class Records(TypedDict):
    """The JSON files about the artifacts of one Triton model, in the order of the artifacts."""

    verdict: list[gate.GateResult]
    signature: "list[Signature]"
    tools: list[dict[str, str]]


def new_provenance(inputs: Paths, settings: Settings, records: Records, code: str) -> Provenance:
    """The provenance of a new version, without the digests of its files.

    Args:
        code: The sha256 of the modules that publish.
    """
    signatures = records["signature"]
    tools = {tool for each in records["tools"] for tool in each.items()}
    gated = [
        statement.gate_result(file, verdict["model"], read_json(inputs[f"{file}.measured"]), verdict["status"], rule)
        for file, verdict in zip(settings["files"], records["verdict"], strict=True)
        if (rule := settings["gate"].get(file))
    ]
    return {
        "build": " ".join(str(verdict["model"]) for verdict in records["verdict"]),
        "weights": digest(inputs["weights"]),
        "source": settings["source"],
        "spec": settings["spec"],
        "code": {
            "publish": code,
            **{name: digest(path) or "" for name, path in inputs.items() if name == path},
        },
        "tools": ", ".join(sorted(f"{name} {version}" for name, version in tools)),
        "packages": packages_of(records["tools"]),
        "tensors": [signatures[0]["inputs"], signatures[-1]["outputs"], *plan_properties(settings, signatures)],
        "needs": onnx_requirements(signatures[0]),
        "parameters": settings["parameters"],
        "gate": gated,
        "samples": read_samples(inputs) if gated else {},
        "files": {},
    }


def packages_of(tools: Iterable[Mapping[str, str]]) -> list[list[str]]:
    """Name and version of the tools that are Python packages.

    Args:
        tools: The tools of each artifact.
    """
    found = {tool for each in tools for tool in each.items()}
    return sorted([name, version] for name, version in found if PACKAGE_NAME.fullmatch(name))


def parts_of(inputs: Paths, settings: Settings, records: Records) -> list[Part]:
    """The steps of an ensemble, for its bill of materials; empty for other models."""
    tools = dict(zip(settings["files"], records["tools"], strict=True))
    return [
        {
            "name": name,
            "files": {file: None if os.path.isdir(inputs[file]) else digest(inputs[file]) for file in step["files"]},
            "packages": packages_of(tools[file] for file in step["files"]),
            "source": step["source"],
            "license": step["license"] or read_license(inputs, f"{name}/license"),
        }
        for name, step in settings["steps"].items()
    ]


def read_license(inputs: Paths, key: str) -> str | None:
    """The license that the source of the weights states; None if it states none, or cannot state one."""
    license_of_weights: str | None = read_json(inputs[key])["license"] if key in inputs else None
    return license_of_weights


def read_samples(inputs: Paths) -> dict[str, Any]:
    """The digest of the samples that the gate used, and their names."""
    with open(inputs["samples.txt"], encoding="utf-8") as file:
        return {"sha256": digest(inputs["samples.json"]), "names": file.read().splitlines()}


def onnx_requirements(signature: "Signature") -> dict[str, int]:
    """The opset and the IR version that a server must support to load an ONNX file; empty for other formats."""
    return {"opset": signature["opset"], "ir_version": signature["ir_version"]} if "opset" in signature else {}


def plan_properties(settings: Settings, signatures: Sequence[Mapping[str, object]]) -> list[Any]:
    """The properties of plans and packages that must be equal in all versions of a model: one row for each file."""
    if settings["format"] not in COMPILED_PROPERTIES:
        return []
    rows = [
        [file, *(signature.get(key) for key in COMPILED_PROPERTIES[settings["format"]])]
        for file, signature in zip(settings["files"], signatures, strict=True)
    ]
    return sorted(rows)  # lists, not tuples, because they are compared with lists that were read from JSON


def write_version(
    provenance: Provenance, version: int, inputs: Paths, folder: str, settings: Settings, records: Records
) -> None:
    """Write the folder of a version, and the digests of its files into its provenance.

    The version of an ensemble holds no artifact. Its provenance is that of its config.pbtxt, and its bill of materials
    names its steps.
    """
    config, folder = f"{folder}/{CONFIG_FILE}", f"{folder}/{version}"
    os.makedirs(folder)
    for artifact in settings["files"] if settings["format"] != "ensemble" else ():
        # Triton expects model.pt and model.onnx, also for model.fp16.pt. The config has the names of plans.
        name = FORMATS[settings["format"]].file if settings["format"] in ("torchscript", "onnx") else artifact
        if settings["format"] == "preprocess":  # a folder
            repository_files.copy(inputs[artifact], folder)
        else:
            repository_files.copy(
                inputs[artifact], f"{folder}/{name}", f"{REPOSITORY}/{settings['name']}/{version}/{name}"
            )
    provenance["files"] = file_digests(folder, remember=False)
    bom = f"{folder}/{BOM_FILE}"
    published = f"{REPOSITORY}/{settings['name']}/{version}/{BOM_FILE}"
    parts = parts_of(inputs, settings, records)
    card = settings["card"]
    card = {**card, "license": card["license"] or read_license(inputs, "license")}
    if write_bom(bom, published, settings["name"], version, provenance, card, parts):
        provenance["files"][BOM_FILE] = digest(bom, remember=False) or ""
    if settings["format"] == "ensemble":  # after its bill of materials, which a change of [triton] leaves as it is
        provenance["files"][CONFIG_FILE] = digest(config, remember=False) or ""
    write_json(f"{folder}/{PROVENANCE_FILE}", statement.to_statement(provenance))
    block_bytecode(folder, settings["format"])
