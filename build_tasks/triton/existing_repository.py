"""A model repository that people wrote: its models, their configs, and which of them this project could build.

    PATH ─► folders with a config.pbtxt or versions ─► ModelConfig, newest served version ─► format, or why none

Nothing is loaded but config.pbtxt. Source of the rules: the core's model_repository_manager.cc and
model_config_utils.cc (GetNormalizedModelConfig), and the server's docs, user_guide/model_repository.md.
"""

import os
from typing import Any, NamedTuple

from build_tasks.errors import UserError, first_lines
from build_tasks.triton import model_config
from build_tasks.triton.platforms import FORMATS
from build_tasks.triton.repository import CONFIG_FILE

ENSEMBLE = "an ensemble connects other models"  # the beginning of its reason
MAX_CONFIG = 1 << 22  # bytes of a config.pbtxt
# The format by what a config calls its platform or its backend.
FORMAT_OF = {
    **{platform.platform: model_format for model_format, platform in FORMATS.items()},
    "pytorch": "torchscript", "onnxruntime": "onnx", "tensorrt": "tensorrt",
}  # fmt: skip
# Why the models of other backends are left alone.
OTHERS = {
    "python": "a Python model is code, and no artifact that is built",
    "dali": "a pipeline of DALI is code, and no artifact that is built",
}


class ExistingModel(NamedTuple):
    """One folder of a repository.

    Attributes:
        name: Of the folder, which is the name of the model.
        folder: Its path.
        config: The ModelConfig of config.pbtxt; an empty one if there is none.
        versions: Numbers of all versions in the folder.
        model_format: A key of FORMATS; "" for a model that is left alone.
        artifact: Path of the file of the newest version that Triton serves; "" for a model that is left alone.
        reason: Why the model is left alone; "" otherwise.
    """

    name: str
    folder: str
    config: Any
    versions: list[int]
    model_format: str
    artifact: str
    reason: str

    @property
    def version(self) -> int:
        """The version of the artifact."""
        return int(os.path.basename(os.path.dirname(self.artifact)))


def read_repository(path: str) -> list[ExistingModel]:
    """Return the models of a repository, or the one of a model's folder.

    Raises:
        UserError: If there is no model.
    """
    path = path.rstrip("/") or "/"
    if not os.path.isdir(path):
        raise UserError(f"expected a model repository or the folder of a model, found {path!r}, which is no folder")
    if is_model_folder(path):
        return [read_model(path)]
    folders = [f"{path}/{name}" for name in sorted(os.listdir(path)) if not name.startswith(".")]
    models = [read_model(folder) for folder in folders if is_model_folder(folder)]
    if not models:
        raise UserError(f"{path}: expected folders with a {CONFIG_FILE} or with versions, found none")
    return models


def is_model_folder(path: str) -> bool:
    """Return whether a path is a folder with a config or with versions."""
    return os.path.isfile(f"{path}/{CONFIG_FILE}") or (os.path.isdir(path) and bool(_versions(path)))


def read_model(folder: str) -> ExistingModel:
    """Return the model of a folder. A model that cannot be built here has a reason, and no artifact."""
    name = os.path.basename(os.path.abspath(folder))
    versions = _versions(folder)
    try:
        config = read_config(f"{folder}/{CONFIG_FILE}")
    except UserError as error:
        return ExistingModel(name, folder, model_config.to_message({}), versions, "", "", str(error))
    left_alone = ExistingModel(name, folder, config, versions, "", "", "")
    if config.name not in ("", name):
        return left_alone._replace(reason=f"the config's name is {config.name!r}, which Triton refuses")
    model_format, reason = _format(config, folder, versions)
    if reason:
        return left_alone._replace(reason=reason)
    file = config.default_model_filename or FORMATS[model_format].file
    if os.path.basename(file) != file:
        return left_alone._replace(reason=f"default_model_filename: expected the name of a file, found {file!r}")
    served = [version for version in _served(config, versions) if os.path.exists(f"{folder}/{version}/{file}")]
    if not served:
        return left_alone._replace(reason=f"no version that Triton serves has a {file}")
    return left_alone._replace(model_format=model_format, artifact=f"{folder}/{served[-1]}/{file}")


def read_config(path: str) -> Any:
    """Return the ModelConfig of a config.pbtxt, an empty one without the file. Its values are not checked.

    Raises:
        UserError: If the file is no ModelConfig in protobuf's text format.
    """
    from google.protobuf import text_format

    message = model_config.protobuf().ModelConfig()
    if not os.path.lexists(path):
        return message
    try:
        if os.path.getsize(path) > MAX_CONFIG:
            raise UserError(f"{CONFIG_FILE}: expected at most {MAX_CONFIG} bytes, found a larger file")
        with open(path, encoding="utf-8") as file:
            text_format.Parse(file.read(), message)
    except (OSError, ValueError, text_format.ParseError) as error:  # ValueError: not UTF-8, or a number out of range
        raise UserError(f"{CONFIG_FILE} cannot be read: {first_lines(error)}") from error
    return message


def _versions(folder: str) -> list[int]:
    """Return the numbers of the versions in a folder. Triton ignores names that begin with a zero."""
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        return []
    return sorted(int(name) for name in names if name.isdecimal() and not name.startswith("0"))


def _format(config: Any, folder: str, versions: list[int]) -> tuple[str, str]:
    """Return the format of a model, or why it is left alone."""
    if config.HasField("ensemble_scheduling"):
        steps = ", ".join(dict.fromkeys(step.model_name for step in config.ensemble_scheduling.step))
        return "", f"{ENSEMBLE}: {steps}"
    kind = config.platform or config.backend
    if not kind:  # Triton finds it from the name of the file
        files = {name for version in versions for name in os.listdir(f"{folder}/{version}")}
        found = [name for name, platform in FORMATS.items() if platform.file in files]
        if len(found) != 1:
            return "", OTHERS["python"] if "model.py" in files else "neither platform nor backend, and no known file"
        return found[0], ""
    if kind not in FORMAT_OF:
        return "", OTHERS.get(kind, f"its backend is {kind}; what can be built is ONNX, TorchScript and TensorRT")
    if config.model_transaction_policy.decoupled:
        return "", "a decoupled model answers a request with any number of responses"
    return FORMAT_OF[kind], ""


def _served(config: Any, versions: list[int]) -> list[int]:
    """Return the versions that Triton serves, by version_policy. Without one it is the newest."""
    policy = config.version_policy
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return versions
    if choice == "specific":
        return [version for version in versions if version in policy.specific.versions]
    return versions[-max(policy.latest.num_versions, 1) :]
