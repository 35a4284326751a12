"""publish: checked artifact, config.pbtxt, labels -> model_repository/<name>, in one step

    model_repository/<name>/config.pbtxt
                           /labels.txt
                           /preprocessing.json   what a client does to an image
                           /1/model.*

and prune: what the specs no longer describe leaves model_repository/.
"""

import json
import os
import shutil
from typing import Any

from build_tasks import files
from build_tasks.config import MARK, first_line
from build_tasks.digests import digest
from build_tasks.errors import UserError
from build_tasks.spec import FORMATS, REPOSITORY, Model
from build_tasks.stage import Notes, Paths, Settings, Stage, code_of

VERSION = "1"


def task(model: Model, format: str, artifacts: list[str]) -> dict[str, Any]:
    """artifacts: the files that this model of Triton's is served from; several are plans of several GPUs."""
    name = model.triton_name(format)
    labels = {"labels": model.artifact("labels.txt")} if model.spec.labels else {}
    stage = Stage(
        name=f"publish:{name}",
        model=model,
        build=build,
        inputs={
            **{file: model.artifact(file) for file in artifacts},
            **{f"{file}.verdict.json": model.artifact(f"{file}.verdict.json") for file in artifacts},
            "preprocessing": model.artifact("preprocessing.json"),
            "config": model.artifact(f"{FORMATS[format].file}.config.pbtxt"),
            **labels,
        },
        outputs={"folder": f"{REPOSITORY}/{name}"},
        settings={"name": name, "files": artifacts},
        tools=(),
        code=code_of("publish"),
        light=True,
    )
    return stage.task(doc=f"{REPOSITORY}/{name}, as Triton loads it")


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    verdicts = {}
    # `doit -s` leaves out the tasks before this one, and another run may rebuild what they read.
    for artifact in settings["files"]:
        path = inputs[f"{artifact}.verdict.json"]
        with open(path, encoding="utf-8") as file:
            verdicts[artifact] = json.load(file)
        if verdicts[artifact]["model"] != digest(inputs[artifact]):
            raise UserError(f"{path} judges another file than {inputs[artifact]}; nothing was published")
    with open(inputs["config"], encoding="utf-8") as file:
        header = file.readline()
    expected = first_line(settings["name"], [verdict["signature"] for verdict in verdicts.values()])
    if not header.startswith(f"{expected} "):
        described = ", ".join(inputs[artifact] for artifact in settings["files"])
        raise UserError(f"{inputs['config']} describes another file than {described}; nothing was published")
    folder = outputs["folder"]
    os.makedirs(f"{folder}/{VERSION}")
    for artifact in settings["files"]:
        copy(inputs[artifact], f"{folder}/{VERSION}/{artifact}")
    copy(inputs["config"], f"{folder}/config.pbtxt")
    copy(inputs["preprocessing"], f"{folder}/preprocessing.json")
    if "labels" in inputs:
        copy(inputs["labels"], f"{folder}/labels.txt")
    return {"accuracy": "; ".join(sorted({verdict["status"] for verdict in verdicts.values()}))}


def copy(source: str, target: str) -> None:
    """A file, or a folder, that is the same afterwards. UserError where the disk says otherwise."""
    if os.path.isdir(source):
        shutil.copytree(source, target, copy_function=shutil.copyfile)
    else:
        shutil.copyfile(source, target)
    if digest(target, remember=False) != digest(source):
        raise UserError(f"the copy of {source} differs from it; is the disk sound?")


def prune_task(models: list[Model]) -> dict[str, Any]:
    described = {model.triton_name(format) for model in models for format in model.served}
    return {
        "actions": [(prune, [described])],
        "uptodate": [lambda: not orphans(described)],
        "io": {"capture": False},
        "doc": f"Remove from {REPOSITORY}/ what the specs no longer describe",
    }


def orphans(described: set[str]) -> list[str]:
    """Folders of the repository that were generated here, and that no spec describes any more."""
    if not os.path.isdir(REPOSITORY):
        return []
    return sorted(name for name in os.listdir(REPOSITORY) if name not in described and is_generated(name))


def is_generated(name: str) -> bool:
    """Whether a folder of the repository was generated under this name; what was made by hand, or copied, was not."""
    if os.path.islink(f"{REPOSITORY}/{name}"):
        return False
    try:
        with open(f"{REPOSITORY}/{name}/config.pbtxt", encoding="utf-8") as file:
            return file.readline().startswith(f"{MARK} {name},")
    except (OSError, UnicodeDecodeError):
        return False


def prune(described: set[str]) -> None:
    for name in orphans(described):
        print(f"removing {REPOSITORY}/{name}: no spec describes it any more", flush=True)
        files.remove(f"{REPOSITORY}/{name}")
