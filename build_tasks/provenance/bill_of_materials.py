"""The bill of materials of a published version: CycloneDX 1.6, with a model card.

    provenance, [card] of the spec ──────────────────────► model card ─┐
    tools and weights, or the steps of an ensemble; their licenses ────┴─► <version>/bom.cdx.json

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
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from build_tasks.json_files import read_json, write_json
from build_tasks.provenance.statement import Provenance, package_url
from build_tasks.runtime import repository_files
from build_tasks.runtime.distributions import installed_version
from build_tasks.runtime.fingerprint import imported_digests
from build_tasks.spec.model import split_source
from build_tasks.triton.platforms import FORMATS

BOM_FILE = "bom.cdx.json"
LIBRARY = "cyclonedx-python-lib"
MAX_LICENSE = 80  # characters; some packages have the whole text of the license in this field
UNKNOWN = "unknown"
# Texts of packages for which there is exactly one SPDX identifier. "BSD" could mean several.
SPDX_IDS = {
    "MIT License": "MIT",
    "Apache 2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "BSD-3": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
}


class Part(TypedDict):
    """A step of an ensemble, another Triton model.

    name: Its name.
    files: The sha256 of each artifact that it is served from; None for a folder.
    packages: Name and version of the tools that built them.
    source: weights.source of its network; empty for a Python model.
    license: Of its weights, where its spec or their source names it.
    """

    name: str
    files: dict[str, str | None]
    packages: list[list[str]]
    source: str
    license: str | None


def write_bom(
    path: str,
    published: str,
    name: str,
    version: int,
    provenance: Provenance,
    card: Mapping[str, Any],
    parts: Sequence[Part] = (),
) -> bool:
    """Write the bill of materials of a version.

    The library takes longer to import than all other work of `publish`. A published file with the same content is
    copied instead.

    Args:
        published: The path of the file of this version in model_repository/, which may not exist.
        name: The Triton model's name.
        provenance: With the digests of the version's files.
        card: The table [card] of the spec, and its architecture.
        parts: The steps of an ensemble. An ensemble holds no weights: its steps do.
    Returns: Whether the library is installed. Without it there is no file.
    """
    if installed_version(LIBRARY) is None:
        return False
    serial_number = uuid.uuid5(uuid.NAMESPACE_URL, _content_digest(name, version, provenance, card, parts))
    if os.path.exists(published) and read_json(published).get("serialNumber") == serial_number.urn:
        repository_files.copy(published, path)
        return True
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6

    kind = ComponentType.MACHINE_LEARNING_MODEL
    model = Component(name=name, version=str(version), type=kind, bom_ref="model")
    files = [_file(file, value) for file, value in provenance["files"].items()]
    packages = {each[0]: _package(*each) for each in provenance["packages"]}
    steps = [
        Component(
            name=part["name"],
            type=kind,
            bom_ref=f"model:{part['name']}",
            licenses=_licenses(part["license"] or license_of_source(part["source"])),
            external_references=_references(part["source"]),
            components=[_file(file, value) for file, value in part["files"].items()],
        )
        for part in parts
    ]
    weights = []
    if holds_network(provenance):
        license_of_weights = _licenses(card["license"] or license_of_source(provenance["source"]))
        weights = [
            Component(
                name="weights",
                type=ComponentType.DATA,
                bom_ref="weights",
                hashes=_hashes(provenance["weights"]),
                licenses=license_of_weights,
                external_references=_references(provenance["source"]),
            )
        ]
    bom = Bom(components=[*weights, *files, *steps, *packages.values()])
    bom.metadata.component = model
    for part, step in zip(parts, steps, strict=True):
        bom.register_dependency(step, [packages[tool] for tool, _ in part["packages"]])
    bom.register_dependency(model, [*weights, *files, *(steps or packages.values())])
    bom.serial_number = serial_number
    value = json.loads(JsonV1Dot6(bom).output_as_string())
    del value["metadata"]["timestamp"]
    value["metadata"]["component"]["modelCard"] = model_card(provenance, card)
    write_json(path, value)
    return True


def holds_network(provenance: Provenance) -> bool:
    """Return whether a version holds a network with weights: ensembles and Python models do not."""
    return provenance["parameters"]["format"] in FORMATS


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
    network: dict[str, Any] = {}
    if holds_network(provenance):
        training = {"type": "dataset", "name": card["training_data"] or UNKNOWN, "description": "training data"}
        network = {
            **({"modelArchitecture": card["architecture"]} if card["architecture"] else {}),
            "datasets": [training],
        }
    precisions = sorted({result["annotations"]["precision"] for result in provenance["gate"]})
    return {
        "modelParameters": {
            **network,
            "inputs": [{"format": _format(tensor)} for tensor in inputs],
            "outputs": [{"format": _format(tensor)} for tensor in outputs],
        },
        **({"quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else {}),
        "properties": [{"name": "precision", "value": ", ".join(precisions) or UNKNOWN}, *properties],
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
        return SPDX_IDS.get(text, text)
    classifiers = [line for line in metadata.get_all("Classifier") or [] if line.startswith("License :: ")]
    text = classifiers[0].rpartition(" :: ")[2] if classifiers else ""
    return SPDX_IDS.get(text, text) or None


def _file(name: str, value: str | None) -> Any:
    from cyclonedx.model.component import Component, ComponentType

    return Component(name=name, type=ComponentType.FILE, bom_ref=f"file:{name}", hashes=_hashes(value))


def _package(name: str, version: str) -> Any:
    from cyclonedx.model.component import Component
    from packageurl import PackageURL

    url = package_url(name, version)
    licenses = _licenses(license_of(name, version))
    return Component(name=name, version=version, purl=PackageURL.from_string(url), bom_ref=url, licenses=licenses)


def _hashes(value: str | None) -> Any:
    from cyclonedx.model import HashAlgorithm, HashType

    return [HashType(alg=HashAlgorithm.SHA_256, content=value)] if value else []


def _licenses(text: str | None) -> Any:
    from cyclonedx.contrib.license.factories import LicenseFactory

    return [LicenseFactory().make_from_string(text)] if text else []


def _references(source: str) -> Any:
    from cyclonedx.model import ExternalReference, ExternalReferenceType, XsUri

    if not source:
        return []
    return [ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=XsUri(source))]


def _format(tensor: Mapping[str, Any]) -> str:
    return f"{tensor['name']}: {tensor['dtype']} {tensor['shape']}"


def _content_digest(
    name: str, version: int, provenance: Provenance, card: Mapping[str, Any], parts: Sequence[Part]
) -> str:
    """The digest of all that a bill of materials is made from, this module included."""
    described = {key: provenance[key] for key in ("weights", "source", "files", "packages", "tensors", "gate")}
    value = [name, version, described, card, parts, installed_version(LIBRARY), imported_digests((__name__,))]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
