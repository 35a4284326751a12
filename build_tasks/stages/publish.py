"""publish: checked artifact, config.pbtxt, labels -> model_repository/<name>

    model_repository/<name>/config.pbtxt          with the provenance of each version, as parameters
                           /labels.txt
                           /preprocessing.json    how a client prepares an image
                           /SHA256SUMS            the manifest: the digest of each file
                           /<version>/model.*
                                     /provenance.json
                                     /bom.cdx.json    what is inside, if cyclonedx-python-lib is installed

With triton.keep_versions = 1, the new folder replaces the old one in a single step. With more, the new version is added
beside the others, which stay as they are.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from build_tasks.errors import UserError
from build_tasks.formats import user_code
from build_tasks.json_files import read_json, write_json
from build_tasks.paths import REPOSITORY
from build_tasks.provenance import bill_of_materials, signature, statement
from build_tasks.provenance.published_versions import (
    copy_version,
    format_versions,
    next_version,
    reusable_versions,
    write_manifest,
)
from build_tasks.provenance.signature import Identity
from build_tasks.provenance.statement import Provenance, file_digests
from build_tasks.runtime import atomic_files, repository_files
from build_tasks.runtime.digests import digest
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.interface import label_files
from build_tasks.spec.model import Model, table_settings
from build_tasks.triton import model_config, releases
from build_tasks.triton.platforms import FORMATS, TRITON_MODELS
from build_tasks.triton.repository import (
    CONFIG_FILE,
    PROVENANCE_FILE,
    block_bytecode,
    bytecode_is_blocked,
    header_line,
    is_label_file,
    overwrite_error,
    provenance_parameters,
)
from build_tasks.verification import gate

if TYPE_CHECKING:
    from build_tasks.tensors import Signature

PACKAGE_NAME = re.compile("[a-z0-9][a-z0-9._-]*")  # a tool that is a Python package, and no fact about a GPU
RECORD_KINDS = ("verdict", "signature", "tools")  # the JSON files about an artifact that publishing requires

# The tables of the spec that change the bytes of an artifact, by format.
ARTIFACT_TABLES = {
    "torchscript": ("architecture", "weights", "input", "output", "torchscript"),
    "onnx": ("architecture", "weights", "input", "output", "onnx"),
    "tensorrt": ("architecture", "weights", "input", "output", "onnx", "engine"),
}

DATA_FOLDERS = (f"{model_config.WARM_UP_FOLDER}/", f"{model_config.INITIAL_STATE_FOLDER}/")  # of the model's folder

PUBLISH_MODULES = (
    "build_tasks.formats.user_code",
    "build_tasks.provenance.bill_of_materials",
    "build_tasks.provenance.published_versions",
    "build_tasks.provenance.signature",
    "build_tasks.provenance.statement",
    "build_tasks.provenance.verify_repository",
    "build_tasks.triton.model_config",
    "build_tasks.triton.platforms",
    "build_tasks.triton.release_table",
    "build_tasks.triton.releases",
    "build_tasks.triton.repository",
    *gate.GATE_MODULES,
)


class Records(TypedDict):
    """The JSON files about the artifacts of one Triton model, in the order of the artifacts."""

    verdict: list[gate.GateResult]
    signature: "list[Signature]"
    tools: list[dict[str, str]]


def task(model: Model, model_format: str, artifacts: list[str]) -> dict[str, Any]:
    """The doit task of one Triton model.

    Args:
        artifacts: The files that the Triton model is served from; for the ensemble, the artifacts of its steps.
            More than one file: TensorRT plans, one for each GPU type.
    """
    name = model.triton_name(model_format)
    source_format = model_format if model_format in FORMATS else model.spec.ensemble
    assert source_format is not None
    # An ensemble has one version: only its steps have versions.
    keep_versions = 1 if model_format == "ensemble" else model.triton_keys.keep_versions
    fields = model_config.fields_of_format(model.config_fields, model_format)
    policy = fields.get("version_policy", {})
    labels = [file for file, _ in label_files(model.spec).values()] if model_format != "preprocess" else []
    umask = repository_files.umask_from_environment()
    gated = {} if model_format == "preprocess" else {
        file: gate.settings_of(model, source_format, model.precision(source_format))
        for file in model.files(source_format) if file in artifacts
    }  # fmt: skip
    signer = signature.from_environment()  # no setting: a signature does not change what is published
    weights, architecture = model.spec.weights, model.spec.architecture
    runs_user_code = weights.converter is not None or architecture.network is not None
    stage = Stage(
        name=f"publish:{name}",
        model=model,
        build=functools.partial(build, signer=signer) if signer else build,
        inputs={
            **{file: model.artifact(file) for file in artifacts},
            **{f"{file}.{kind}": model.artifact(f"{file}.{kind}.json") for file in artifacts for kind in RECORD_KINDS},
            **{f"{file}.measured": model.artifact(f"{file}.measured.json") for file in gated},
            **({name: model.artifact(name) for name in ("samples.json", "samples.txt")} if gated else {}),
            **({path: path for path in user_code.python_files(model)} if runs_user_code else {}),
            "weights": model.weights,
            "config": model.artifact(f"{TRITON_MODELS[model_format].file}.config.pbtxt"),
            **({"preprocessing.json": model.artifact("preprocessing.json")} if model_format in FORMATS else {}),
            **{file: model.artifact(file) for file in labels},
            **{file: model.source(file) for file in model_config.config_files(fields)},
        },
        outputs={"folder": f"{REPOSITORY}/{name}"},
        settings={
            "name": name,
            "format": model_format,
            "files": artifacts,
            "spec": spec_digest(model, source_format),
            "source": weights.source,
            "code": statement.code_digest(),
            "gate": gated,
            "card": {**table_settings(model.spec.card), "architecture": architecture.timm or architecture.network},
            "parameters": {"model": model.name, "format": model_format},
            "keep_versions": keep_versions,
            "first_version": model.triton_keys.first_version,
            "release": model.release if keep_versions > 1 else None,  # it must be able to load the older versions
            "specific": policy.get("specific", {}).get("versions", []) if policy else [],
            "provenance": model.triton_keys.provenance,
            "umask": umask,
        },
        tools=(bill_of_materials.LIBRARY,),
        modules=(__name__, *PUBLISH_MODULES),
        in_process=True,
        install=functools.partial(
            repository_files.install,
            move=atomic_files.replace if keep_versions == 1 else atomic_files.sync_dir,
            overwrite_error=folder_overwrite_error,
            umask=umask,
        ),
        overwrite_error=folder_overwrite_error,
    )
    return stage.task(doc=f"{REPOSITORY}/{name}, as Triton loads it")


def folder_overwrite_error(folder: str) -> str | None:
    """Return why a folder of the repository must not be replaced, None if it may be."""
    return overwrite_error(os.path.basename(folder))


def spec_digest(model: Model, model_format: str) -> str:
    """The sha256 of the tables that change the bytes of an artifact, without comments, accuracy limits and [triton]."""
    tables = table_settings(model.spec) | {"torchscript": table_settings(model.torchscript)}
    text = json.dumps({table: tables[table] for table in ARTIFACT_TABLES[model_format]}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def build(inputs: Paths, outputs: Paths, settings: Settings, signer: Identity | None = None) -> Notes:
    records = read_records(inputs, settings)
    verdicts, signatures = records["verdict"], records["signature"]
    folder, several = outputs["folder"], settings["keep_versions"] > 1
    os.makedirs(folder)
    for name, path in inputs.items():
        if name == "preprocessing.json" or is_label_file(name) or name.startswith(DATA_FOLDERS):
            os.makedirs(os.path.dirname(f"{folder}/{name}"), exist_ok=True)
            repository_files.copy(path, f"{folder}/{name}")
    new = new_provenance(inputs, settings, records)
    versions, unusable = reusable_versions(settings, new)
    same = [version for version, provenance in versions.items() if provenance["build"] == new["build"]]
    # If the newest version holds these artifacts already, there is no new one.
    version = None if several and same and max(same) == max(versions) else next_version(versions, unusable, settings)
    if version is not None:
        versions[version] = new
    kept = sorted(versions)[-settings["keep_versions"] :]
    if missing := sorted(set(settings["specific"]) - set(kept)):
        raise UserError(
            f"triton.version_policy.specific: version {missing[0]} is not published, only {format_versions(kept)}"
        )
    repository_files.copy(inputs["config"], f"{folder}/config.pbtxt")
    if settings["provenance"]:
        with open(f"{folder}/config.pbtxt", "a", encoding="utf-8") as file:
            file.writelines(provenance_parameters(versions[version], version) for version in kept)
    for number in kept:
        published = f"{REPOSITORY}/{settings['name']}/{number}"
        if number == version:
            write_version(new, version, inputs, folder, settings)
        elif not signer and bytecode_is_blocked(published, settings["format"]):
            os.symlink(os.path.abspath(published), f"{folder}/{number}")
        else:
            copy_version(published, f"{folder}/{number}", settings["format"])
    write_manifest(folder)
    if signer:
        signature.sign(folder, signer, f"{folder}/{signature.SIGNATURE}")
    notes = {"accuracy": "; ".join(sorted({verdict["status"] for verdict in verdicts}))}
    if option := releases.server_option(signatures):
        notes["server option"] = option
    if several:
        notes["versions"] = format_versions(kept)
        if unusable:
            notes["dropped"] = f"{format_versions(unusable)}, because of other tensors or of changed files"
    return notes


def new_provenance(inputs: Paths, settings: Settings, records: Records) -> Provenance:
    """The provenance of a new version, without the digests of its files."""
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
            "the project": settings["code"],
            **{name: digest(path) or "" for name, path in inputs.items() if name == path},
        },
        "tools": ", ".join(sorted(f"{name} {version}" for name, version in tools)),
        "packages": sorted([name, version] for name, version in tools if PACKAGE_NAME.fullmatch(name)),
        "tensors": [signatures[0]["inputs"], signatures[-1]["outputs"], *plan_properties(settings, signatures)],
        "needs": onnx_requirements(signatures[0]),
        "parameters": settings["parameters"],
        "gate": gated,
        "samples": read_samples(inputs) if gated else {},
        "files": {},
    }


def read_samples(inputs: Paths) -> dict[str, Any]:
    """The digest of the samples that the gate used, and their names."""
    with open(inputs["samples.txt"], encoding="utf-8") as file:
        return {"sha256": digest(inputs["samples.json"]), "names": file.read().splitlines()}


def read_records(inputs: Paths, settings: Settings) -> Records:
    """The records about the artifacts.

    Raises:
        UserError: If the gate result or config.pbtxt belongs to another file than this artifact.
    """
    records: Records = {"verdict": [], "signature": [], "tools": []}
    # `doit -s` does not run the tasks before this one, and a second doit may rebuild an artifact meanwhile. Without
    # these checks, an artifact would be published that the gate has not checked.
    for artifact in settings["files"]:
        records["verdict"].append(read_json(inputs[f"{artifact}.verdict"]))
        records["signature"].append(read_json(inputs[f"{artifact}.signature"]))
        records["tools"].append(read_json(inputs[f"{artifact}.tools"]))
        if records["verdict"][-1]["model"] != digest(inputs[artifact]):
            path = inputs[f"{artifact}.verdict"]
            raise UserError(f"{path} is the gate result of another file than {inputs[artifact]}; nothing was published")
    with open(inputs["config"], encoding="utf-8") as file:
        header = file.readline()
    expected = header_line(settings["name"], [verdict["signature"] for verdict in records["verdict"]])
    if not header.startswith(f"{expected} "):
        described = ", ".join(inputs[artifact] for artifact in settings["files"])
        raise UserError(f"{inputs['config']} describes another file than {described}; nothing was published")
    return records


def onnx_requirements(signature: "Signature") -> dict[str, int]:
    """The opset and the IR version that a server must support to load an ONNX file; empty for other formats."""
    return {"opset": signature["opset"], "ir_version": signature["ir_version"]} if "opset" in signature else {}


def plan_properties(settings: Settings, signatures: Sequence[Mapping[str, object]]) -> list[Any]:
    """The properties of plans that must be equal in all versions of a model: one row for each file."""
    if settings["format"] != "tensorrt":
        return []
    keys = ("profile", "TensorRT", "version_compatible")
    rows = [
        [file, *(signature.get(key) for key in keys)]
        for file, signature in zip(settings["files"], signatures, strict=True)
    ]
    return sorted(rows)  # lists, not tuples, because they are compared with lists that were read from JSON


def write_version(provenance: Provenance, version: int, inputs: Paths, folder: str, settings: Settings) -> None:
    """Write the folder of a version, and the digests of its files into its provenance.

    The version of an ensemble holds no artifact. Its provenance is that of its config.pbtxt.
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
    if settings["format"] == "ensemble":
        provenance["files"][CONFIG_FILE] = digest(config, remember=False) or ""
    bom = f"{folder}/{bill_of_materials.BOM_FILE}"
    if bill_of_materials.write_bom(bom, settings["name"], version, provenance, settings["card"]):
        provenance["files"][bill_of_materials.BOM_FILE] = digest(bom, remember=False) or ""
    write_json(f"{folder}/{PROVENANCE_FILE}", statement.to_statement(provenance))
    block_bytecode(folder, settings["format"])
