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
from collections.abc import Iterable, Iterator
from typing import Any

from build_tasks.errors import UserError
from build_tasks.formats import user_code
from build_tasks.formats.ensemble_steps import PYTHON, Step, inner_steps, last_network, python_artifact
from build_tasks.json_files import read_json
from build_tasks.paths import REPOSITORY
from build_tasks.provenance import bill_of_materials, signature, statement
from build_tasks.provenance.new_version import Records, new_provenance, write_version
from build_tasks.provenance.published_versions import (
    copy_version,
    format_versions,
    next_version,
    reusable_versions,
    write_manifest,
)
from build_tasks.provenance.signature import Identity
from build_tasks.runtime import atomic_files, repository_files
from build_tasks.runtime.digests import digest
from build_tasks.runtime.fingerprint import imported_digests
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.ensemble_tables import python_folders, short_form
from build_tasks.spec.interface import label_files
from build_tasks.spec.model import Model, table_settings
from build_tasks.spec.warm_up import warm_up_folder, warm_up_values
from build_tasks.triton import model_config, releases
from build_tasks.triton.platforms import FORMATS, TRITON_MODELS
from build_tasks.triton.repository import (
    bytecode_is_blocked,
    header_line,
    is_label_file,
    overwrite_error,
    provenance_parameters,
)
from build_tasks.verification import gate

RECORD_KINDS = ("verdict", "signature", "tools")  # the JSON files about an artifact that publishing requires

# The tables of the spec that change the bytes of an artifact, by format.
ARTIFACT_TABLES = {
    "torchscript": ("architecture", "weights", "input", "output", "torchscript"),
    "onnx": ("architecture", "weights", "input", "output", "onnx"),
    "tensorrt": ("architecture", "weights", "input", "output", "onnx", "engine"),
    "aoti": ("architecture", "weights", "input", "output", "aoti"),
    "ensemble": ("ensemble",),  # without a network
    PYTHON: (),
}

TENSOR_TABLES = ("inputs", "dimensions", "outputs")  # of every network, where the spec has them

DATA = ("preprocessing.json", model_config.WARM_UP_FOLDER)
DATA_FOLDERS = (f"{model_config.WARM_UP_FOLDER}/", f"{model_config.INITIAL_STATE_FOLDER}/")  # of the model's folder

PUBLISH_MODULES = (
    "build_tasks.formats.user_code",
    "build_tasks.provenance.bill_of_materials",
    "build_tasks.provenance.new_version",
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
MODULES = (__name__, *PUBLISH_MODULES)


def task(model: Model, model_format: str, artifacts: list[str]) -> dict[str, Any]:
    """The doit task of one Triton model that is no ensemble.

    Args:
        artifacts: The files that the Triton model is served from. More than one file: TensorRT plans, one for each GPU
            type.
    """
    network = model_format  # a preprocessing model follows from the network of its ensemble
    if model_format not in FORMATS:
        network = short_form(model.spec.ensemble) or next(iter(model.served_formats), "onnx")
    config = model.artifact(f"{TRITON_MODELS[model_format].file}.config.pbtxt")
    paths = {file: model.artifact(file) for file in artifacts}
    gated = gate_settings(model, model_format, artifacts) if model_format in FORMATS else {}
    return _task(
        model, model.triton_name(model_format), model_format, paths, config, spec_digest(model, network), gated
    )


def ensemble_task(model: Model, steps: list[Step]) -> dict[str, Any]:
    """The doit task of the ensemble. It is served together with its steps."""
    network = last_network(steps)
    of_spec = spec_digest(network.model, network.kind) if network else spec_digest(model, "ensemble")
    paths = {key: path for step in steps for key, path in step.artifacts.items()}
    config = model.artifact(f"{TRITON_MODELS['ensemble'].file}.config.pbtxt")
    inner = inner_steps(steps)
    own = [step for step in inner if step.kind in FORMATS and step.model.name == model.name]
    gated = {key: rule for step in own for key, rule in gate_settings(model, step.kind, step.artifacts).items()}
    measured = {"measured": f"{config.removesuffix('config.pbtxt')}measured.json"} if model.steps else {}
    task = _task(model, model.triton_name("ensemble"), "ensemble", paths, config, of_spec, gated, measured, inner)
    task["task_dep"] = [f"publish:{step.name}" for step in steps]
    return task


def python_tasks(model: Model) -> Iterator[dict[str, Any]]:
    """Yield the doit tasks of the Python models of the user that are steps of an ensemble."""
    for folder in python_folders(model.steps):
        path, name = model.artifact(python_artifact(folder)), model.python_name(folder)
        paths, config = {python_artifact(folder): path}, f"{path}.config.pbtxt"
        yield _task(model, name, "preprocess", paths, config, spec_digest(model, PYTHON), {})


def gate_settings(model: Model, model_format: str, files: Iterable[str]) -> dict[str, Settings]:
    """The settings of the gate for each artifact of a format."""
    settings = gate.settings_of(model, model_format, model.precision(model_format))
    return {file: settings for file in model.files(model_format) if file in files}


def _task(
    model: Model,
    name: str,
    model_format: str,
    artifacts: dict[str, str],
    config: str,
    digest_of_spec: str,
    gated: dict[str, Settings],
    files: Paths | None = None,
    steps: Iterable[Step] = (),
) -> dict[str, Any]:
    """The doit task of one Triton model.

    Args:
        artifacts: The paths of what it is served from, by name; of an ensemble, those of all its steps.
        config: The path of its config.pbtxt in build/.
        digest_of_spec: The digest of the tables that its artifacts depend on.
        gated: The settings of the gate for those artifacts of this model that have figures.
        files: Further files that must exist before it is published.
        steps: The steps of an ensemble.
    """
    # An ensemble has one version: only its steps have versions.
    keep_versions = 1 if model_format == "ensemble" else model.triton_keys.keep_versions
    # The config.pbtxt of a Python model of the user is the user's, so that [triton] does not concern it.
    named = name == model.triton_name(model_format)
    fields = model_config.fields_of_format(model.config_fields, model_format) if named else {}
    policy = fields.get("version_policy", {})
    inputs = model.spec.inputs
    of_pictures = model_format in FORMATS and (not inputs or any(each.layout for each in inputs))
    labels = [file for file, _ in label_files(model.spec).values()] if model_format != "preprocess" else []
    umask = repository_files.umask_from_environment()
    signer = signature.from_environment()  # no setting: a signature does not change what is published
    weights, architecture = model.spec.weights, model.spec.architecture
    runs_user_code = weights.converter is not None or architecture.network is not None
    stage = Stage(
        name=f"publish:{name}",
        model=model,
        build=functools.partial(build, signer=signer) if signer else build,
        inputs={
            **artifacts,
            **{f"{key}.{kind}": f"{path}.{kind}.json" for key, path in artifacts.items() for kind in RECORD_KINDS},
            **{f"{file}.measured": model.artifact(f"{file}.measured.json") for file in gated},
            **({name: model.artifact(name) for name in ("samples.json", "samples.txt")} if gated else {}),
            **({path: path for path in user_code.python_files(model)} if runs_user_code else {}),
            "weights": model.weights,
            **({"license": path} if (path := model.weights_license) else {}),
            **{f"{step.name}/license": path for step in steps if (path := step.model.weights_license)},
            "config": config,
            **(files or {}),
            **({"preprocessing.json": model.artifact("preprocessing.json")} if of_pictures else {}),
            **{file: model.artifact(file) for file in labels},
            **{file: model.source(file) for file in model_config.config_files(fields)},
            **({model_config.WARM_UP_FOLDER: warm_up_folder(config)} if warm_up_values(model, model_format) else {}),
        },
        outputs={"folder": f"{REPOSITORY}/{name}"},
        settings={
            "name": name,
            "format": model_format,
            "files": list(artifacts),
            "spec": digest_of_spec,
            "source": weights.source,
            "gate": gated,
            "card": {**table_settings(model.spec.card), "architecture": architecture.timm or architecture.network},
            "steps": {step.name: step_settings(step) for step in steps},
            "parameters": {"model": model.name, "format": model_format},
            "keep_versions": keep_versions,
            "first_version": model.triton_keys.first_version,
            "release": model.release if keep_versions > 1 else None,  # it must be able to load the older versions
            "specific": policy.get("specific", {}).get("versions", []) if policy else [],
            "provenance": model.triton_keys.provenance,
            "umask": umask,
        },
        tools=(bill_of_materials.LIBRARY,),
        modules=MODULES,
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


def step_settings(step: Step) -> Settings:
    """The settings of a step of an ensemble, for the bill of materials."""
    spec, network = step.model.spec, step.kind in FORMATS
    return {
        "files": list(step.artifacts),
        "source": spec.weights.source if network else "",
        "license": spec.card.license if network else None,
    }


def folder_overwrite_error(folder: str) -> str | None:
    """Return why a folder of the repository must not be replaced, None if it may be."""
    return overwrite_error(os.path.basename(folder))


def spec_digest(model: Model, model_format: str) -> str:
    """The sha256 of the tables that change the bytes of an artifact, without comments, accuracy limits and [triton]."""
    with_defaults = {"torchscript": model.torchscript, "aoti": model.aoti}
    tables = table_settings(model.spec) | {name: table_settings(table) for name, table in with_defaults.items()}
    names = [
        *ARTIFACT_TABLES[model_format],
        *(name for name in TENSOR_TABLES if tables[name] and model_format in FORMATS),
    ]
    text = json.dumps({table: tables[table] for table in names}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def build(inputs: Paths, outputs: Paths, settings: Settings, signer: Identity | None = None) -> Notes:
    records = read_records(inputs, settings)
    verdicts, signatures = records["verdict"], records["signature"]
    folder, several = outputs["folder"], settings["keep_versions"] > 1
    os.makedirs(folder)
    for name, path in inputs.items():
        if name in DATA or is_label_file(name) or name.startswith(DATA_FOLDERS):
            os.makedirs(os.path.dirname(f"{folder}/{name}"), exist_ok=True)
            repository_files.copy(path, f"{folder}/{name}")
    new = new_provenance(inputs, settings, records, statement.code_digest(imported_digests(MODULES)))
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
            write_version(new, version, inputs, folder, settings, records)
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
