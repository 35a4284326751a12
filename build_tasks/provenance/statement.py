"""The provenance of a published version: an in-toto statement v1 with a SLSA provenance v1 predicate.

    weights, spec, code, tools ─► resolvedDependencies ─┐
    gate results, samples ──────► byproducts ───────────┼─► <version>/provenance.json
    files of the version ───────► subject ──────────────┘

The same inputs give the same bytes: there are no times, paths or names of machines in it.

Sources: https://github.com/in-toto/attestation/tree/main/spec/v1, https://slsa.dev/spec/v1.0/provenance
"""

import hashlib
import os
from collections.abc import Mapping
from typing import Any, TypedDict, cast

from build_tasks.json_files import read_json
from build_tasks.runtime.digests import digest
from build_tasks.triton.repository import BYTECODE, PROVENANCE_FILE

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
# Names for what has no address of its own; docs/reference/provenance.md describes both.
BUILDER = "urn:triton-model-repository-build"
BUILD_TYPE = f"{BUILDER}:publish:v1"
CODE_OF = "code of "  # how the names of these dependencies begin


class Provenance(TypedDict):
    """What is known about a version, as publishing uses it. `to_statement` and `read_provenance` convert it."""

    build: str  # sha256 of the artifacts, separated by spaces
    weights: str | None  # sha256
    source: str  # weights.source of the spec, without a query
    spec: str  # sha256 of the tables that change the bytes of the artifacts
    code: dict[str, str]  # sha256 of the modules that publish, and of the Python files of the model
    tools: str  # "onnx 1.23.2, torch 2.14.1"; for plans also the GPU
    packages: list[list[str]]  # name and version of the tools that are Python packages
    tensors: list[Any]  # tensors and properties of plans; must be equal in all versions that are served together
    needs: dict[str, int]  # the server must support this opset and ir_version (ONNX only)
    parameters: dict[str, str]  # model, format
    gate: list[dict[str, Any]]  # the gate result of each artifact, see gate_result
    samples: dict[str, Any]  # their digest, and their names
    files: dict[str, str]  # sha256 of the files in the version's folder, by path


def code_digest(modules: Mapping[str, str]) -> str:
    """Return the sha256 over source modules of this project.

    Args:
        modules: The digest of each, by dotted name.
    """
    listing = "".join(f"{name}\0{value}\0" for name, value in sorted(modules.items()))
    return hashlib.sha256(listing.encode()).hexdigest()


def gate_result(file: str, artifact: str | None, measured: Mapping[str, Any], status: str, rule: dict[str, Any]) -> Any:
    """The gate result of an artifact as a resource descriptor: its status, its figures, and the limits of the gate.

    Args:
        file: The artifact's name.
        artifact: Its sha256.
        measured: The content of <file>.measured.json.
        rule: The settings of the gate.
    """
    from build_tasks.verification import gate

    outputs: dict[str, Any] = {}
    for name, output in measured["outputs"].items():
        limits = gate.limits(name, output, rule)
        values = gate.metric_values(output, gate.tie_tolerance(limits, output, rule))
        outputs[name] = {metric: {"value": value} for metric, value in values.items()}
        for metric, limit in limits.items():
            outputs[name].setdefault(metric, {})["limit"] = limit
    annotations = {
        "status": status,
        "precision": rule["precision"],
        "samples": measured["samples"],
        "reference": measured["reference"],
        "outputs": outputs,
    }
    return {"name": f"gate result of {file}", "digest": {"sha256": artifact}, "annotations": annotations}


def to_statement(provenance: Provenance) -> dict[str, Any]:
    """Return the provenance of a version as in-toto's statement."""
    samples = provenance["samples"]
    dependencies: list[dict[str, Any]] = [
        {"name": "weights", "uri": provenance["source"], "digest": {"sha256": provenance["weights"]}},
        {"name": "spec", "digest": {"sha256": provenance["spec"]}},
        *({"name": f"{CODE_OF}{name}", "digest": {"sha256": value}} for name, value in provenance["code"].items()),
        *({"name": name, "uri": package_url(name, version)} for name, version in provenance["packages"]),
    ]
    if samples:
        dependencies.append({
            "name": "samples", "digest": {"sha256": samples["sha256"]}, "annotations": {"names": samples["names"]}
        })  # fmt: skip
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": value}} for name, value in provenance["files"].items()],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": provenance["parameters"],
                "internalParameters": {
                    "artifacts": provenance["build"].split(),
                    "tensors": provenance["tensors"],
                    "needs": provenance["needs"],
                    "tools": provenance["tools"],
                },
                "resolvedDependencies": dependencies,
            },
            "runDetails": {"builder": {"id": BUILDER}, "byproducts": provenance["gate"]},
        },
    }


def package_url(name: str, version: str) -> str:
    """Return the package URL of a distribution.

    Source: https://github.com/package-url/purl-spec, type pypi.
    """
    return f"pkg:pypi/{name.lower().replace('_', '-')}@{version}"


def read_provenance(folder: str) -> Provenance | None:
    """The provenance in the folder of a version, None if there is none or if it is incomplete.

    Older releases of this project wrote a record with other names, and without code, gate and samples.
    """
    try:
        value = read_json(f"{folder}/{PROVENANCE_FILE}")
        if "predicate" not in value:
            return _read_older(value)
        definition = value["predicate"]["buildDefinition"]
        internal, dependencies = definition["internalParameters"], definition["resolvedDependencies"]
        digests = {entry["name"]: entry["digest"]["sha256"] for entry in dependencies if "digest" in entry}
        samples = [entry["annotations"]["names"] for entry in dependencies if entry["name"] == "samples"]
        packages = [[e["name"], e["uri"].rpartition("@")[2]] for e in dependencies if "digest" not in e]
        return {
            "build": " ".join(internal["artifacts"]),
            "weights": digests["weights"],
            "source": dependencies[0]["uri"],
            "spec": digests["spec"],
            "code": {name[len(CODE_OF) :]: value for name, value in digests.items() if name.startswith(CODE_OF)},
            "tools": internal["tools"],
            "packages": packages,
            "tensors": internal["tensors"],
            "needs": internal["needs"],
            "parameters": definition["externalParameters"],
            "gate": value["predicate"]["runDetails"]["byproducts"],
            "samples": {"sha256": digests["samples"], "names": samples[0]} if samples else {},
            "files": {entry["name"]: entry["digest"]["sha256"] for entry in value["subject"]},
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None


def _read_older(record: dict[str, Any]) -> Provenance:
    unknown: dict[str, Any] = {
        "source": "", "code": {}, "packages": [], "parameters": {}, "gate": [], "samples": {}
    }  # fmt: skip
    known = {key: record[key] for key in Provenance.__required_keys__ - unknown.keys()}
    return cast(Provenance, {**unknown, **known})


def file_digests(folder: str, remember: bool = True) -> dict[str, str]:
    """The sha256 of the files in the folder of a version, by path, without its provenance and without bytecode."""
    paths: list[str] = []
    for parent, _, names in os.walk(folder):
        paths += [os.path.relpath(os.path.join(parent, name), folder) for name in names]
    own = [path for path in paths if path != PROVENANCE_FILE and path.partition("/")[0] != BYTECODE]
    return {path: digest(f"{folder}/{path}", remember) or "" for path in sorted(own)}
