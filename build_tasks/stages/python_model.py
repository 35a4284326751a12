"""python_model: a folder beside the spec -> a Python model of Triton's, a step of an ensemble

    models/<model>/<folder>/model.py, more files ─► checked ─► build/<model>/python/<folder>/
                           /config.pbtxt ─────────► checked ─► build/<model>/python/<folder>.config.pbtxt

The folder has the config.pbtxt of its Triton model, without name and backend. The sources are compiled, and never run:
they need Triton's Python backend. Source of the interface: the Python backend's README, "Usage".
"""

import ast
import os
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError, first_lines
from build_tasks.formats.ensemble_steps import python_artifact
from build_tasks.json_files import write_json
from build_tasks.paths import MODELS
from build_tasks.runtime import repository_files
from build_tasks.runtime.digests import digest
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.ensemble_tables import python_folders
from build_tasks.spec.model import Model
from build_tasks.spec.model_files import walk
from build_tasks.triton import model_config as triton_config
from build_tasks.triton import newer_fields
from build_tasks.triton.derived_config import CONFIG_MODULES, to_text
from build_tasks.triton.derived_tensors import signature_of
from build_tasks.triton.repository import BYTECODE, CONFIG_FILE, header_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from build_tasks.verification.gate import GateResult

CLASS, METHOD = "TritonPythonModel", "execute"


def tasks(model: Model) -> "Iterator[dict[str, Any]]":
    """Yield the doit tasks of the Python models of the user that are steps of an ensemble."""
    for folder in python_folders(model.steps):
        yield _task(model, folder)


def files_of(model: Model, folder: str) -> dict[str, str]:
    """Return the paths of the files in the folder of a Python model, by their paths in it. Bytecode is left out."""
    source = f"{MODELS}/{model.name}/{folder}"
    paths = walk(source, [os.path.realpath(f"{MODELS}/{model.name}")], skip_outside=True)
    files = {os.path.relpath(path, source): os.path.normpath(path) for path in paths}
    return {name: path for name, path in sorted(files.items()) if BYTECODE not in name.split(os.sep)}


def _task(model: Model, folder: str) -> dict[str, Any]:
    file = python_artifact(folder)
    stage = Stage(
        name=f"python_model:{model.python_name(folder)}",
        model=model,
        build=build,
        inputs=files_of(model, folder),
        outputs={
            "model": model.artifact(file),
            "config": model.artifact(f"{file}.config.pbtxt"),
            "signature": model.artifact(f"{file}.signature.json"),
            "verdict": model.artifact(f"{file}.verdict.json"),
            "tools": model.artifact(f"{file}.tools.json"),
        },
        settings={
            "name": model.python_name(folder),
            "folder": f"{MODELS}/{model.name}/{folder}",
            "spec": model.file,
            "release": model.release,
        },
        tools=("tritonclient",),
        modules=(__name__, *CONFIG_MODULES),
        in_process=True,
    )
    return stage.task(doc=f"The Python model {model.python_name(folder)}, from {MODELS}/{model.name}/{folder}/")


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    config = read_config(inputs[CONFIG_FILE], settings)
    for name, path in inputs.items():
        if name.endswith(".py"):
            check_source(path, is_model=name == "model.py")
    os.makedirs(outputs["model"])
    for name, path in inputs.items():
        if name != CONFIG_FILE:
            os.makedirs(os.path.dirname(f"{outputs['model']}/{name}"), exist_ok=True)
            repository_files.copy(path, f"{outputs['model']}/{name}")
    write_json(outputs["signature"], signature_of(config))
    write_json(outputs["tools"], {})
    result: GateResult = {
        "model": digest(outputs["model"], remember=False),
        "signature": digest(outputs["signature"], remember=False),
        "status": "ok",
    }
    write_json(outputs["verdict"], result)
    with open(outputs["config"], "w", encoding="utf-8") as file:
        file.write(f"{header_line(config.name, [result['signature']])} from {settings['spec']}\n{to_text(config)}")
    return {"files": len(inputs) - 1, "max_batch_size": config.max_batch_size}


def read_config(path: str, settings: Settings) -> Any:
    """Return the ModelConfig of a Python model, with its name, its backend and an instance group.

    Raises:
        UserError: If it cannot be parsed, or if Triton would refuse it.
    """
    from google.protobuf import text_format

    from build_tasks.triton import model_config_checks

    config = triton_config.to_message({})
    try:
        with open(path, encoding="utf-8") as file:
            text_format.Parse(file.read(), config)
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a ModelConfig: {first_lines(error)}") from error
    for field, expected in (("name", settings["name"]), ("backend", "python"), ("platform", "")):
        if (found := getattr(config, field)) not in ("", expected):
            raise UserError(
                f"{path}: {field}: expected {f'{expected!r}, or ' * bool(expected)}nothing, found {found!r}"
            )
    config.name, config.backend = settings["name"], "python"
    for kind, tensors in (("input", config.input), ("output", config.output)):
        if not tensors:
            raise UserError(f"{path}: {kind}: expected the {kind}s of the Python model, found none")
        for index, tensor in enumerate(tensors):
            key = f"{path}: {kind}[{index}]"
            if not tensor.name or tensor.name in [each.name for each in tensors[:index]]:
                raise UserError(f"{key}.name: expected a name, each once, found {tensor.name!r}")
            if tensor.data_type == triton_config.enum("DataType", "TYPE_INVALID"):
                raise UserError(f"{key}.data_type: expected the type of {tensor.name}, found nothing")
            if not tensor.dims or any(dim < 1 and dim != -1 for dim in tensor.dims):
                raise UserError(f"{key}.dims: expected dims >= 1, or -1 if open, found {list(tensor.dims)}")
    if config.model_transaction_policy.decoupled:
        raise UserError(f"{path}: model_transaction_policy.decoupled: expected false, for one answer, found true")
    if not config.instance_group:
        config.instance_group.add(count=1, kind=triton_config.enum("ModelInstanceGroup.Kind", "KIND_CPU"))
    inputs = [tensor.name for tensor in config.input]
    found_mistakes = [
        *newer_fields.mistakes(config, settings["release"]),
        *model_config_checks.config_mistakes(config, "preprocess", inputs),
    ]
    for key, expected, found in found_mistakes:
        raise UserError(f"{path}: {key}: expected {expected}, found {found}")
    return config


def check_source(path: str, *, is_model: bool) -> None:
    """Compile a Python file.

    Args:
        is_model: Whether it must have the class that Triton's Python backend looks for.

    Raises:
        UserError: If it is not Python, or if the class or its method is missing.
    """
    try:
        with open(path, "rb") as file:
            tree = ast.parse(file.read(), path)
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise UserError(f"{path}{line}: not Python: {getattr(error, 'msg', error)}") from error
    if not is_model:
        return
    body = next((node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == CLASS), None)
    names = [node.name for node in body or () if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    if METHOD not in names:
        found = "no such class" if body is None else f"a class with {', '.join(names) or 'no method'}"
        raise UserError(f"{path}: expected a class {CLASS} with the method {METHOD}, found {found}")
