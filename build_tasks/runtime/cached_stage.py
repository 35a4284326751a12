"""A stage and the build cache: the key of its result, and how the result is found, fetched and stored.

    settings, digests of inputs and code, by role ─► key ─► action of these tools ─► drafts, and the record of the build

The key holds neither the name of the model nor a path, so that two models that share a step share its result. The name
is part of it only where the targets may contain the name.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from build_tasks.paths import BUILD, MODELS
from build_tasks.runtime import atomic_files, build_cache, fingerprint, hardware
from build_tasks.runtime.cache_entries import Action, key_of
from build_tasks.runtime.digests import digest
from build_tasks.runtime.fingerprint import BuildRecord
from build_tasks.spec.model import Model

Content = Callable[[str], str | None]


class CachedStage(Protocol):
    """What this module uses of a stage; see runtime/stage.py."""

    @property
    def name(self) -> str: ...
    @property
    def model(self) -> Model: ...
    @property
    def build(self) -> Callable[..., Any]: ...
    @property
    def inputs(self) -> dict[str, str]: ...
    @property
    def outputs(self) -> dict[str, str]: ...
    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def modules(self) -> tuple[str, ...]: ...
    @property
    def source_files(self) -> tuple[str, ...]: ...
    @property
    def external_inputs(self) -> dict[str, str | None]: ...
    @property
    def missing_requirements(self) -> Callable[[], str | None]: ...
    @property
    def made_elsewhere(self) -> bool: ...
    @property
    def names_model(self) -> bool: ...
    @property
    def reproducible(self) -> bool: ...
    def tool_fingerprint(self) -> dict[str, str]: ...


def find(stage: CachedStage, content: Content = digest) -> Action | None:
    """Return the result of a stage in the cache, None if there is none that this machine may use.

    Args:
        content: Returns the digest of the file or folder at a path, None if it does not exist or is not known.
    """
    found = _find(stage, content, _external(stage))
    return found and found[1]


def fetch(
    stage: CachedStage, inputs: Mapping[str, str], external: Mapping[str, str | None], drafts: dict[str, str]
) -> BuildRecord | None:
    """Write the drafts of a stage from the cache.

    Args:
        inputs: The digests of the files of the project that it reads, by path.
        external: Those of the files outside the project, by the name that the stage gives them.
        drafts: The path of each target in the scratch folder.
    Returns: What the record of the build holds about its result; None if the cache does not have it.
    """
    if (found := _find(stage, inputs.get, external)) is None:
        return None
    key, action = found
    if not build_cache.of_run().fetch(key, action, drafts, stage.name):
        for draft in drafts.values():
            atomic_files.remove_tree(draft)
        return None
    builder = " ".join(filter(None, (action.machine.get("user"), action.machine.get("host"))))
    return {
        "notes": action.notes,
        "tools": action.tools,
        "seconds": action.seconds,
        "fetched": {"by": builder, "time": action.time},
    }


def store(stage: CachedStage, record: BuildRecord) -> None:
    """Add the result of a stage that has run to the cache, beside the build."""
    key = key_of_stage(stage, record["inputs"].get, record["external_inputs"])
    if key is not None:
        driver = None if stage.reproducible else hardware.driver()
        build_cache.of_run().store(stage.name, key, stage.outputs, record, driver)


def key_of_stage(stage: CachedStage, content: Content, external: Mapping[str, str | None]) -> str | None:
    """Return the fingerprint of a stage without its tools, as one key. None if the content of an input is not known."""
    inputs = {_role(stage, name, path): content(path) for name, path in stage.inputs.items()}
    sources = {_role(stage, path, path): content(path) for path in stage.source_files}
    if None in (*inputs.values(), *sources.values()):
        return None
    build = getattr(stage.build, "func", stage.build)  # a functools.partial holds the query of a URL, a secret
    settings = {
        name: _shared(stage, value)
        for name, value in stage.settings.items()
        if name != "model" or stage.names_model or stage.model.spec.architecture.network is not None
    }  # TorchScript writes the name of a network's module into its code, and that has the name of the model
    return key_of(
        {
            "stage": f"{stage.name.partition(':')[0]} {build.__module__}.{build.__qualname__}",
            "settings": settings,
            "inputs": inputs,
            "sources": sources,
            "external inputs": dict(external),
            "modules": fingerprint.imported_digests(stage.modules),
            "outputs": sorted(stage.outputs),
        }
    )


def _find(stage: CachedStage, content: Content, external: Mapping[str, str | None]) -> tuple[str, Action] | None:
    if stage.missing_requirements() and not stage.made_elsewhere:
        return None
    if (key := key_of_stage(stage, content, external)) is None:
        return None
    action = build_cache.of_run().find(key, stage.tool_fingerprint())
    return None if action is None else (key, action)


def _external(stage: CachedStage) -> dict[str, str | None]:
    return {name: path and digest(path) for name, path in stage.external_inputs.items()}


def _role(stage: CachedStage, name: str, path: str) -> str:
    """Return the name of an input without the name of the model and without a path of this machine."""
    return str(_shared(stage, name)) if name == path else name


def _shared(stage: CachedStage, value: Any) -> Any:
    """Return a setting without the name of the model in a path, unless the targets may contain it."""
    if stage.names_model or not isinstance(value, str):
        return value
    for folder in (f"{MODELS}/{stage.model.name}", f"{BUILD}/{stage.model.name}"):
        if value == folder or value.startswith(f"{folder}/"):
            return f".{value.removeprefix(folder)}"
    # A folder outside the project, which a setting names, is another one on each machine.
    for name, setting in stage.settings.items():
        if isinstance(setting, str) and os.path.isabs(setting) and f"{value}/".startswith(f"{setting}/"):
            return f"<{name}>{value.removeprefix(setting)}"
    return value
