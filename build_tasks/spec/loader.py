"""models/<model>/model.toml -> Model. All mistakes of all specs are reported together, one line each."""

import contextlib
import itertools
import os
import stat
import tomllib
from collections.abc import Iterable, Mapping, Sequence

from msgspec import ValidationError, convert

from build_tasks.errors import UserError
from build_tasks.paths import MODELS, has_spec
from build_tasks.spec import ensemble_checks, model_files, validation, value_checks
from build_tasks.spec.model import Model, Spec
from build_tasks.spec.overrides import Overrides

MAX_BYTES = 1 << 20  # of a model.toml
MAX_MISTAKES = 20  # lines on one model.toml


def load(
    reserved: Iterable[str] = (),
    overrides: Mapping[str, Overrides] | None = None,
    unchanged: Mapping[str, Mapping[str, str]] | None = None,
    folders: Sequence[str] | None = None,
) -> list[Model]:
    """Return the models under models/, sorted by name.

    Args:
        reserved: Names that a model cannot have, because doit uses them for a command or a stage.
        overrides: Values from the command line that replace keys of the spec, by model.
        unchanged: Models whose specs have not changed and are not read: Model.triton_models, by model.
        folders: The result of model_names, if the caller has it already.

    Raises:
        UserError: With a line for every mistake in any of the specs.
    """
    folders, unchanged = model_names() if folders is None else folders, unchanged or {}
    if not folders:
        raise UserError(f"{MODELS}/: there is no model; a model is a folder with a file model.toml")
    model_files.data_folders()  # once, so that a wrong setting is one mistake
    models, mistakes = [], []
    for name in folders:
        if name in unchanged:
            continue
        try:
            models.append(read_model(name, (overrides or {}).get(name, {})))
        except UserError as error:
            mistakes += str(error).split("\n")
    triton_models = {**unchanged, **{model.name: model.triton_models for model in models}}
    mistakes += validation.name_mistakes(folders, triton_models, set(reserved))
    if not mistakes:  # a step may name a model whose spec could not be read
        mistakes += ensemble_checks.unknown_steps(models, triton_models)
        mistakes += ensemble_checks.endless_steps(models)
    if mistakes:
        raise UserError(*mistakes)
    return models


def model_names() -> list[str]:
    """Return the names of the models, sorted."""
    return sorted(folder for folder in _entries() if has_spec(folder))


def folder_names() -> list[str]:
    """Return the names of all folders in models/, with or without a spec, sorted."""
    return sorted(name for name in _entries() if os.path.isdir(f"{MODELS}/{name}"))


def _entries() -> list[str]:
    try:
        return os.listdir(MODELS)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{MODELS}/: {error.strerror}") from None


def parse_new(name: str, content: bytes, reserved: Iterable[str]) -> Model:
    """Return a model that will be added to the existing ones.

    Args:
        content: Of its model.toml.
        reserved: Names that a model cannot have.

    Raises:
        UserError: With a line for every mistake in the new spec. Mistakes in other specs do not count.
    """
    model = parse(name, content)
    check_new(model, reserved)
    return model


def check_new(model: Model, reserved: Iterable[str]) -> None:
    """Check that a model can be added to the existing ones.

    Raises:
        UserError: If its name, or that of one of its Triton models, is taken or not allowed.
    """
    others = []
    for folder in _entries():
        with contextlib.suppress(UserError):
            others.append(read_model(folder))
    triton_models = {each.name: each.triton_models for each in [*others, model]}
    if mistakes := list(validation.name_mistakes([model.name], triton_models, set(reserved))):
        raise UserError(*mistakes)
    if mistakes := list(ensemble_checks.unknown_steps([model], triton_models)):
        raise UserError(*mistakes)


def read_model(name: str, overrides: Overrides | None = None) -> Model:
    """Return the model of a folder in models/.

    Args:
        overrides: Values from the command line that replace keys.

    Raises:
        UserError: If its model.toml cannot be read, and with a line for every mistake in it.
    """
    path = f"{MODELS}/{name}/model.toml"
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{path}: expected a file, found a FIFO or a device")
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: expected at most {MAX_BYTES} bytes, found a larger file")
    return parse(name, content, overrides)


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file. A FIFO, for which `open` waits until somebody writes into it, is opened at once."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def parse(name: str, content: bytes, overrides: Overrides | None = None) -> Model:
    """Return the model of a model.toml.

    Args:
        content: Of the file.
        overrides: Values from the command line that replace keys.

    Raises:
        UserError: With a line for every mistake. The line names the options that were used.
    """
    path, overrides = f"{MODELS}/{name}/model.toml", overrides or {}
    try:
        document = tomllib.loads(content.decode())
    except RecursionError:
        raise UserError(f"{path}: {value_checks.TOO_DEEP}, found more") from None
    except ValueError as error:  # of TOML, of UTF-8, or of an integer with thousands of digits
        raise UserError(f"{path}: not valid TOML: {error}") from None
    if mistake := value_checks.document_mistake(document):
        raise UserError(f"{path}: {mistake}")
    for (table, key), (option, value) in overrides.items():
        path += f" {option}"
        if isinstance(document.setdefault(table, {}), dict):
            document[table][key] = value
    try:
        model = Model(name, convert(document, Spec))
    except ValidationError as error:
        raise UserError(f"{path}: {validation.type_mistake(error, document)}") from None
    found_mistakes = validation.mistakes(model, overrides)
    mistakes = [
        f"{path}: {key}: expected {expected}, found {found}"
        for key, expected, found in itertools.islice(found_mistakes, MAX_MISTAKES)
    ]
    if next(found_mistakes, None):
        mistakes.append(f"{path}: there are more mistakes than these {MAX_MISTAKES}")
    if mistakes:
        raise UserError(*mistakes)
    return model.without_query()
