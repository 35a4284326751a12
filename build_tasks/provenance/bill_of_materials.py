"""The bill of materials of a published version: CycloneDX 1.6, with a model card.

    provenance, [card] of the spec ─► model card ─┐
    tools and weights, their licenses ────────────┴─► <version>/bom.cdx.json

The library cyclonedx-python-lib writes the file. It has no classes for model cards, so the card is added to its result;
a test validates the whole against the schema. The same inputs give the same bytes: the serial number follows from the
content, and there is no timestamp.

Source: https://cyclonedx.org/docs/1.6/json/#metadata_component_modelCard
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import uuid
from collections.abc import Mapping
from typing import Any

from build_tasks.json_files import read_json, write_json
from build_tasks.provenance.statement import Provenance, package_url
from build_tasks.runtime import repository_files
from build_tasks.runtime.distributions import installed_version
from build_tasks.spec.model import split_source

BOM_FILE = "bom.cdx.json"
LIBRARY = "cyclonedx-python-lib"
MAX_LICENSE = 80  # characters; some packages have the whole text of the license in this field
UNKNOWN = "unknown"


def write_bom(
    path: str, published: str, name: str, version: int, provenance: Provenance, card: Mapping[str, Any]
) -> bool:
    """Write the bill of materials of a version.

    The library takes longer to import than all other work of `publish`. A published file with the same content is
    copied instead.

    Args:
        published: The path of the file of this version in model_repository/, which may not exist.
        name: The Triton model's name.
        provenance: With the digests of the version's files.
        card: The table [card] of the spec, and its architecture.
    Returns: Whether the library is installed. Without it there is no file.
    """
    if installed_version(LIBRARY) is None:
        return False
    serial_number = uuid.uuid5(uuid.NAMESPACE_URL, _content_digest(name, version, provenance, card))
    if os.path.exists(published) and read_json(published).get("serialNumber") == serial_number.urn:
        repository_files.copy(published, path)
        return True
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    model = Component(name=name, version=str(version), type=ComponentType.MACHINE_LEARNING_MODEL, bom_ref="model")
    weights = Component(
        name="weights",
        type=ComponentType.DATA,
        bom_ref="weights",
        hashes=_hashes(provenance["weights"]),
        licenses=_licenses(card["license"] or license_of_source(provenance["source"])),
        external_references=_references(provenance["source"]),
    )
    files = [
        Component(name=file, type=ComponentType.FILE, bom_ref=f"file:{file}", hashes=_hashes(value))
        for file, value in provenance["files"].items()
    ]
    tools = [
        Component(
            name=tool,
            version=tool_version,
            purl=PackageURL.from_string(package_url(tool, tool_version)),
            bom_ref=package_url(tool, tool_version),
            licenses=_licenses(license_of(tool, tool_version)),
        )
        for tool, tool_version in provenance["packages"]
    ]
    bom = Bom(components=[weights, *files, *tools])
    bom.metadata.component = model
    bom.register_dependency(model, [weights, *files, *tools])
    bom.serial_number = serial_number
    value = json.loads(JsonV1Dot6(bom).output_as_string())
    del value["metadata"]["timestamp"]
    value["metadata"]["component"]["modelCard"] = model_card(provenance, card)
    write_json(path, value)
    return True


def model_card(provenance: Provenance, card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model card: architecture, tensors, figures of the gate, and what the spec says about training."""
    inputs, outputs = provenance["tensors"][:2]
    metrics, properties = [], []
    for result in provenance["gate"]:
        found = result["annotations"]
        properties.append({"name": result["name"], "value": found["status"]})
        properties.append({"name": f"samples of the {result['name']}", "value": str(found["samples"])})
        for output, figures in found["outputs"].items():
            for metric, figure in figures.items():
                if "value" in figure:
                    metrics.append({"type": metric, "value": repr(figure["value"]), "slice": output})
                if "limit" in figure:
                    properties.append({"name": f"limit of {metric}, {output}", "value": repr(figure["limit"])})
    training = {"type": "dataset", "name": card["training_data"] or UNKNOWN, "description": "training data"}
    return {
        "modelParameters": {
            **({"modelArchitecture": card["architecture"]} if card["architecture"] else {}),
            "datasets": [training],
            "inputs": [{"format": _format(tensor)} for tensor in inputs],
            "outputs": [{"format": _format(tensor)} for tensor in outputs],
        },
        **({"quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else {}),
        "properties": [
            {"name": "precision", "value": next((r["annotations"]["precision"] for r in provenance["gate"]), UNKNOWN)},
            *properties,
        ],
    }


def license_of_source(source: str) -> str | None:
    """Return the license of weights that come from an installed package; None for other sources."""
    scheme, rest = split_source(source)
    return license_of(rest.partition("/")[0], None) if scheme == "package" else None


@functools.cache
def license_of(distribution: str, version: str | None) -> str | None:
    """Return the license of an installed distribution, as its metadata has it; None if it is unknown.

    Args:
        version: The version that must be installed; None for any.
    """
    try:
        metadata = importlib.metadata.metadata(distribution)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    if version is not None and metadata["Version"].partition("+")[0] != version:
        return None
    expressions, texts = metadata.get_all("License-Expression"), metadata.get_all("License")
    if expressions:
        return str(expressions[0])
    text = str(texts[0]) if texts else ""
    if 0 < len(text) <= MAX_LICENSE and text.isprintable() and text.upper() != "UNKNOWN":
        return text
    classifiers = [line for line in metadata.get_all("Classifier") or [] if line.startswith("License :: ")]
    return classifiers[0].rpartition(" :: ")[2] if classifiers else None


def _hashes(value: str | None) -> Any:
    from cyclonedx.model import HashAlgorithm, HashType

    return [HashType(alg=HashAlgorithm.SHA_256, content=value)] if value else []


def _licenses(text: str | None) -> Any:
    from cyclonedx.factory.license import LicenseFactory

    return [LicenseFactory().make_from_string(text)] if text else []


def _references(source: str) -> Any:
    from cyclonedx.model import ExternalReference, ExternalReferenceType, XsUri

    if not source:
        return []
    return [ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=XsUri(source))]


def _format(tensor: Mapping[str, Any]) -> str:
    return f"{tensor['name']}: {tensor['dtype']} {tensor['shape']}"


def _content_digest(name: str, version: int, provenance: Provenance, card: Mapping[str, Any]) -> str:
    """The digest of all that a bill of materials is made from."""
    described = {key: provenance[key] for key in ("weights", "source", "files", "packages", "tensors", "gate")}
    value = [name, version, described, card, installed_version(LIBRARY)]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
