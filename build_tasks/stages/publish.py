"""publish: checked artifact, config.pbtxt, labels -> model_repository/<name>

    model_repository/<name>/config.pbtxt          with the provenance of each version, as parameters
                           /labels.txt
                           /preprocessing.json    what a client does to an image
                           /<version>/model.*
                                     /provenance.json

In one step where one version is kept; where several are, the new one comes beside the others, which stay untouched.
"""

import hashlib
import json
import os
from typing import Any

from build_tasks.errors import UserError
from build_tasks.json_files import read_json, write_json
from build_tasks.paths import REPOSITORY
from build_tasks.runtime import atomic_files
from build_tasks.runtime.digests import digest
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.model import Model, table_settings
from build_tasks.triton import model_config, releases
from build_tasks.triton.platforms import FORMATS, TRITON_MODELS
from build_tasks.triton.repository import header_line

PROVENANCE = "provenance.json"
PARAMETERS = ("build", "weights", "spec", "tools")  # what of it a server tells

# What of the spec decides an artifact.
DECIDING = {
    "torchscript": ("architecture", "weights", "input", "output", "torchscript"),
    "onnx": ("architecture", "weights", "input", "output", "onnx"),
    "tensorrt": ("architecture", "weights", "input", "output", "onnx", "engine"),
}

PUBLISH_MODULES = (
    "build_tasks.triton.model_config",
    "build_tasks.triton.platforms",
    "build_tasks.triton.releases",
    "build_tasks.triton.repository",
)


def task(model: Model, model_format: str, artifacts: list[str]) -> dict[str, Any]:
    """artifacts: the files that this model of Triton's is served from, or, of an ensemble, that its steps are.

    Several files are plans of several GPUs.
    """
    name = model.triton_name(model_format)
    of = model_format if model_format in FORMATS else model.spec.ensemble
    assert of is not None
    kept = 1 if model_format == "ensemble" else model.triton("keep_versions")  # its steps are what has versions
    fields = model_config.fields_of_format(model.config_fields, model_format)
    policy = fields.get("version_policy", {})
    warm_up = model_config.warm_up_files(fields)
    stage = Stage(
        name=f"publish:{name}",
        model=model,
        build=build,
        inputs={
            **{file: model.artifact(file) for file in artifacts},
            **{f"{file}.{kind}": model.artifact(f"{file}.{kind}.json") for file in artifacts for kind in ABOUT},
            "weights": model.weights,
            "config": model.artifact(f"{TRITON_MODELS[model_format].file}.config.pbtxt"),
            **({"preprocessing.json": model.artifact("preprocessing.json")} if model_format in FORMATS else {}),
            **(
                {"labels.txt": model.artifact("labels.txt")}
                if model.spec.labels and model_format != "preprocess"
                else {}
            ),
            **{f"warmup/{file}": f"{model.warm_up_folder}/{file}" for file in warm_up},
        },
        outputs={"folder": f"{REPOSITORY}/{name}"},
        settings={
            "name": name,
            "format": model_format,
            "files": artifacts,
            "spec": spec_digest(model, of),
            "keep_versions": kept,
            "release": model.release if kept > 1 else None,  # which must load the older versions, too
            "specific": policy.get("specific", {}).get("versions", []) if policy else [],
            "provenance": model.triton("provenance"),
        },
        tools=(),
        modules=(__name__, *PUBLISH_MODULES),
        in_process=True,
        install=atomic_files.replace if kept == 1 else atomic_files.sync_dir,
    )
    return stage.task(doc=f"{REPOSITORY}/{name}, as Triton loads it")


ABOUT = ("verdict", "signature", "tools")  # what is written of an artifact, and needed to publish it


def spec_digest(model: Model, model_format: str) -> str:
    """Of the tables that decide an artifact; comments, limits of accuracy and what is for Triton do not."""
    tables = table_settings(model.spec) | {"torchscript": table_settings(model.torchscript)}
    deciding = json.dumps({table: tables[table] for table in DECIDING[model_format]}, sort_keys=True)
    return hashlib.sha256(deciding.encode()).hexdigest()


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    verdicts, signatures, tools = checked(inputs, settings)
    folder, several = outputs["folder"], settings["keep_versions"] > 1
    os.makedirs(folder)
    for name, path in inputs.items():
        if name in ("labels.txt", "preprocessing.json") or name.startswith("warmup/"):
            os.makedirs(os.path.dirname(f"{folder}/{name}"), exist_ok=True)
            copy(path, f"{folder}/{name}")
    new = {
        "build": " ".join(verdict["model"] for verdict in verdicts),
        "weights": digest(inputs["weights"]),
        "spec": settings["spec"],
        "tools": ", ".join(sorted({f"{name} {version}" for each in tools for name, version in each.items()})),
        "tensors": [signatures[0]["inputs"], signatures[-1]["outputs"], *plans(settings, signatures)],
        "needs": {key: signatures[0][key] for key in ("opset", "ir_version") if key in signatures[0]},
    }
    kept, gone = reusable_versions(settings, new)
    same = [version for version, known in kept.items() if known["build"] == new["build"]]
    if several and same and max(same) == max(kept):
        version = max(same)
    else:
        version = max([*kept, *gone, 0]) + several or 1
        write_version(new, version, inputs, folder, settings)
        kept[version] = new
    staying = sorted(kept)[-settings["keep_versions"] :]
    for other in staying:
        if not os.path.exists(f"{folder}/{other}"):
            os.symlink(os.path.abspath(f"{REPOSITORY}/{settings['name']}/{other}"), f"{folder}/{other}")
    if missing := sorted(set(settings["specific"]) - set(staying)):
        raise UserError(f"triton.version_policy.specific: there is no version {missing[0]}, only {told(staying)}")
    copy(inputs["config"], f"{folder}/config.pbtxt")
    if settings["provenance"]:
        with open(f"{folder}/config.pbtxt", "a", encoding="utf-8") as file:
            file.writelines(parameters(kept[version], version) for version in staying)
    notes = {"accuracy": "; ".join(sorted({verdict["status"] for verdict in verdicts}))}
    if several:
        notes["versions"] = told(staying)
        if gone:
            notes["dropped"] = f"{told(gone)}, with other tensors, or not as published"
    return notes


def checked(inputs: Paths, settings: Settings) -> list[list[dict[str, Any]]]:
    """The verdicts, signatures and tools of the artifacts. UserError where they, or the config, are of others."""
    known: list[list[dict[str, Any]]] = [[], [], []]
    # `doit -s` leaves out the tasks before this one, and another run may rebuild what they read.
    for artifact in settings["files"]:
        for kind, told in zip(ABOUT, known, strict=True):
            told.append(read_json(inputs[f"{artifact}.{kind}"]))
        if known[0][-1]["model"] != digest(inputs[artifact]):
            path = inputs[f"{artifact}.verdict"]
            raise UserError(f"{path} judges another file than {inputs[artifact]}; nothing was published")
    with open(inputs["config"], encoding="utf-8") as file:
        header = file.readline()
    expected = header_line(settings["name"], [verdict["signature"] for verdict in known[0]])
    if not header.startswith(f"{expected} "):
        described = ", ".join(inputs[artifact] for artifact in settings["files"])
        raise UserError(f"{inputs['config']} describes another file than {described}; nothing was published")
    return known


def write_version(provenance: dict[str, Any], version: int, inputs: Paths, folder: str, settings: Settings) -> None:
    """A version, below `folder`, and what it holds into its provenance, which alone is in an ensemble's."""
    folder = f"{folder}/{version}"
    os.makedirs(folder)
    for artifact in settings["files"] if settings["format"] != "ensemble" else ():
        # What is cast is told by its config, and by its provenance; Triton looks for model.pt.
        name = FORMATS["torchscript"].file if settings["format"] == "torchscript" else artifact
        if settings["format"] == "preprocess":  # a folder
            copy(inputs[artifact], folder)
        else:
            copy(inputs[artifact], f"{folder}/{name}", f"{REPOSITORY}/{settings['name']}/{version}/{name}")
    provenance["files"] = contents(folder, remember=False)
    write_json(f"{folder}/{PROVENANCE}", provenance)


def reusable_versions(settings: Settings, new: dict[str, Any]) -> tuple[dict[int, dict[str, Any]], list[int]]:
    """The versions that are published and can be served beside a new one, by number; and those that cannot.

    One config.pbtxt is for all of them: so their tensors must be the same, and of plans the files, the profiles and
    the TensorRT. The server's release must load them, since one that fails fails the model. And they must be what was
    published.
    """
    folder = f"{REPOSITORY}/{settings['name']}"
    numbers = [int(name) for name in os.listdir(folder) if name.isdecimal()] if os.path.isdir(folder) else []
    kept, gone = {}, []
    for number in sorted(numbers):
        known = read_provenance(f"{folder}/{number}")
        same = known.get("tensors") == new["tensors"] and known.get("files") == contents(f"{folder}/{number}")
        if same and not (known["needs"] and releases.load_error(settings["release"], "onnx", known["needs"])):
            kept[number] = known
        else:
            gone.append(number)
    return kept, gone


def plans(settings: Settings, signatures: list[dict[str, Any]]) -> list[Any]:
    """What else must be the same of plans that are versions of one model; nothing of other formats."""
    if settings["format"] != "tensorrt":
        return []
    about = ("profile", "TensorRT", "version_compatible")
    told = [[signature.get(key) for key in about] for signature in signatures]
    return sorted([file, *of] for file, of in zip(settings["files"], told, strict=True))  # lists, as JSON has them


def read_provenance(folder: str) -> dict[str, Any]:
    """What a published version says that it is; nothing where it does not."""
    try:
        known = read_json(f"{folder}/{PROVENANCE}")
    except (OSError, ValueError):
        return {}
    whole = isinstance(known, dict) and {*PARAMETERS, "tensors", "needs", "files"} <= known.keys()
    return known if whole else {}


def contents(folder: str, remember: bool = True) -> dict[str, str | None]:
    """The digests of what a version holds, by name."""
    besides = {PROVENANCE, "__pycache__"}
    return {name: digest(f"{folder}/{name}", remember) for name in sorted({*os.listdir(folder)} - besides)}


def parameters(provenance: dict[str, Any], version: int) -> str:
    """What a server tells of a version, in protobuf's text format, whose strings are JSON's where they are ASCII."""
    lines = ""
    for key in PARAMETERS:
        value = f"value {{ string_value: {json.dumps(provenance[key])} }}"
        lines += f'parameters {{ key: "provenance.{version}.{key}" {value} }}\n'
    return lines


def told(versions: list[int]) -> str:
    return ", ".join(map(str, versions))


def copy(source: str, target: str, published: str | None = None) -> None:
    """A file, or a folder, that is the same afterwards. UserError where the disk says otherwise.

    published: what may be that file already, and then only needs the new name besides its own, which goes with its
    folder: so another config.pbtxt writes no artifact again.
    """
    if published is None or digest(published) != digest(source) or not atomic_files.link(published, target):
        atomic_files.copy(source, target)
    if digest(target, remember=False) != digest(source):
        raise UserError(f"the copy of {source} differs from it; is the disk sound?")
