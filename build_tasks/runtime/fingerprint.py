"""What decides whether a stage is up to date: what its targets were built from, compared with what is there now.

    settings, files, source modules, tools ─┐
                                            ├─► as recorded when the stage ran? ─► up to date
    targets ────────────────────────────────┘   else: one line for each difference

Files and source modules are compared by the sha256 of their content. A file is recorded by its path, and a module of
this project by its dotted name, as the stages declare it. tests/runtime/test_fingerprint.py checks what they declare.
"""

import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict

from build_tasks.runtime.digests import digest
from build_tasks.spec.model import Model
from build_tasks.spec.tables import Table

NEVER_BUILT = "no record of a build"
OTHER_VERSION = "built by another version of this project"
NO_VALUE = object()  # differs from every value of a setting
SHA256 = re.compile("[0-9a-f]{64}")


class BuildRecord(TypedDict, total=False):
    """What doit remembers of the last run of a stage; empty where the stage never ran.

    inputs: digests of the files that the stage read, by path.
    modules: digests of the project's source modules, by dotted name.
    external_inputs: digests of the files outside the project, by the name that the stage gives them.
    tools: versions of distributions, and facts of this machine, by name.
    outputs, sizes: digest and number of bytes of each target, by path. A folder has no size.
    notes: figures and lines about the result, for the reporter and for the report.
    seconds: the time that the stage took.
    """

    inputs: dict[str, str]
    modules: dict[str, str]
    external_inputs: dict[str, str | None]
    settings: dict[str, Any]
    tools: dict[str, str]
    outputs: dict[str, str | None]
    sizes: dict[str, int]
    notes: dict[str, Any]
    seconds: float


@functools.cache
def imported_digests(modules: tuple[str, ...]) -> dict[str, str]:
    """Digests of source modules by dotted name, as they were when this process first asked for them.

    A stage asks when it is declared, right after its modules were imported. The table of each tuple is made once: a
    thousand models declare the same few tuples.
    """
    return {module: _imported_digest(module) for module in modules}


@functools.cache
def _imported_digest(module: str) -> str:
    if (value := digest(source_path(module))) is None:
        raise FileNotFoundError(f"{source_path(module)}, which a stage declares as {module}, does not exist")
    return value


def source_path(module: str) -> str:
    """The file of a module of this project, relative to the project."""
    return f"{module.replace('.', '/')}.py"


def edited_modules(modules: tuple[str, ...]) -> list[str]:
    """The modules whose source is no longer what this process imported."""
    return [module for module, before in imported_digests(modules).items() if digest(source_path(module)) != before]


def changed_settings(model: Model, before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """The settings that differ, each under its key of the spec if it has one.

    Args:
        prefix: The table within `before` and `now` that is compared, "engine." for example; "" for all.
    """
    reasons = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            reasons += changed_settings(model, old, new, f"{prefix}{key}.")
        elif old != new:
            name = prefix + key if prefix else spec_key_of(model, key, new)
            digests = all(isinstance(value, str) and SHA256.fullmatch(value) for value in (old, new))
            reasons.append(f"{name}: {_difference(str(old), str(new)) if digests else f'{old!r} -> {new!r}'}")
    return reasons


def changed_tools(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The tools of this machine whose version is another one than at the build."""
    return [f"{tool}: {before.get(tool)} -> {version}" for tool, version in now.items() if before.get(tool) != version]


def changed_content(before: Mapping[str, str], now: Mapping[str, str | None]) -> list[str]:
    """The files or modules that are new, missing or have another digest than at the build, sorted by name."""
    return [
        f"{name}: {_difference(before.get(name), now.get(name))}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def changed_external_inputs(before: Mapping[str, str | None], paths: Mapping[str, str | None]) -> list[str]:
    """The files outside the project that differ. A file that this machine lacks counts as unchanged."""
    return [
        f"{name}: changed"
        for name, path in paths.items()
        if path is not None and digest(path) not in (None, before.get(name))
    ]


def changed_outputs(record: BuildRecord, paths: Iterable[str]) -> list[str]:
    """The targets that are no longer as they were built."""
    if "outputs" not in record:
        return []
    reasons = []
    for path in paths:
        before, now = record["outputs"].get(path), digest(path)
        if before != now:
            size = record.get("sizes", {}).get(path, 0)
            left = file_size(path) if now else None
            truncated = f", truncated to {left} of {size} bytes" if left is not None and left < size else ""
            reasons.append(f"{path}: {_difference(before, now)}{truncated}")
    return reasons


class UpToDate:
    """doit's `uptodate` of a stage.

    `doit info TASK` prints it, and so shows why the task would run.

    Args:
        changes: Lists the differences between a record and what is there now.
    """

    __signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in ("task", "values")]
    )  # doit would compute it for each task

    def __init__(self, changes: Callable[[BuildRecord], list[str]]):
        self.changes = changes
        self.reasons: list[str] = []

    def __call__(self, task: Any, values: BuildRecord) -> bool:
        try:
            self.reasons = self.changes(values)
        except OSError as error:  # a file cannot be read: the stage itself will fail, and no other one
            self.reasons = [str(error)]
        return not self.reasons

    def __repr__(self) -> str:
        return "; ".join(self.reasons)


def spec_key_of(model: Model, key: str, value: Any) -> str:
    """The key of the spec that a setting comes from, "onnx.opset"; the setting's own name where that is ambiguous."""
    tables = {name: getattr(model.spec, name) for name in model.spec.__struct_fields__}
    tables["torchscript"] = model.torchscript  # with its defaults, which depend on another table
    found = [
        name for name, table in tables.items() if isinstance(table, Table) and getattr(table, key, NO_VALUE) == value
    ]
    return f"{found[0]}.{key}" if len(found) == 1 and key not in tables else key


def file_size(path: str) -> int | None:
    """The bytes of a file; None for a folder, or where nothing is."""
    return os.path.getsize(path) if os.path.isfile(path) else None


def _difference(before: str | None, now: str | None) -> str:
    if before is None:
        return "new"
    if now is None:
        return "missing"
    return f"sha256 {before[:8]} -> {now[:8]}"
