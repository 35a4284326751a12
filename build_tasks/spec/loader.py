"""models/<model>/model.toml -> Model. All mistakes of all specs are reported together, one line each."""

import contextlib
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence

from msgspec import ValidationError, convert

from build_tasks.errors import UserError
from build_tasks.paths import MODELS
from build_tasks.spec import validation
from build_tasks.spec.model import Model, Spec
from build_tasks.spec.overrides import Overrides


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
    models, mistakes = [], []
    for name in folders:
        if name in unchanged:
            continue
        try:
            models.append(_read(name, (overrides or {}).get(name, {})))
        except UserError as error:
            mistakes.append(str(error))
    triton_models = {**unchanged, **{model.name: model.triton_models for model in models}}
    mistakes += validation.name_mistakes(folders, triton_models, set(reserved))
    if mistakes:
        raise UserError("\n".join(mistakes))
    return models


def model_names() -> list[str]:
    """Return the names of the models, sorted."""
    return sorted(folder for folder in _folders() if os.path.exists(f"{MODELS}/{folder}/model.toml"))


def _folders() -> list[str]:
    try:
        return os.listdir(MODELS)
    except FileNotFoundError:
        return []


def parse_new(name: str, content: bytes, reserved: Iterable[str]) -> Model:
    """Return a model that will be added to the existing ones.

    Args:
        content: Of its model.toml.
        reserved: Names that a model cannot have.

    Raises:
        UserError: With a line for every mistake in the new spec. Mistakes in other specs do not count.
    """
    others = []
    for folder in _folders():
        with contextlib.suppress(UserError):
            others.append(_read(folder, {}))
    model = parse(name, content)
    triton_models = {each.name: each.triton_models for each in [*others, model]}
    if mistakes := list(validation.name_mistakes([name], triton_models, set(reserved))):
        raise UserError("\n".join(mistakes))
    return model


def _read(name: str, overrides: Overrides) -> Model:
    path = f"{MODELS}/{name}/model.toml"
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return parse(name, content, overrides)


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
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    for (table, key), (option, value) in overrides.items():
        path += f" {option.removesuffix(' True')}"
        if isinstance(document.setdefault(table, {}), dict):
            document[table][key] = value
    try:
        model = Model(name, convert(document, Spec))
    except ValidationError as error:
        raise UserError(f"{path}: {validation.type_mistake(error, document)}") from None
    if mistakes := [
        f"{path}: {key}: expected {expected}, found {found}"
        for key, expected, found in validation.mistakes(model, overrides)
    ]:
        raise UserError("\n".join(mistakes))
    return model
