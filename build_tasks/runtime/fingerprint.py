"""Decides whether a stage is up to date: compares its record with the current files, settings and tools.

    settings, files, source modules, tools ─┐
                                            ├─► the same as in the record? ─► up to date
    targets ────────────────────────────────┘   otherwise: one line for each difference

Files and source modules are compared by the sha256 of their content. A file is recorded by its path, and a module of
this project by its dotted name, as the stages declare it. tests/runtime/test_fingerprint.py checks that each stage
declares all modules that it imports.
"""

import functools
import inspect
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict

from build_tasks.paths import BUILD
from build_tasks.runtime.digests import digest
from build_tasks.spec.model import Model
from build_tasks.spec.tables import Table

NEVER_BUILT = "not built yet"
OTHER_VERSION = "built by another version of this project"
NO_VALUE = object()  # differs from every value of a setting
SHA256 = re.compile("[0-9a-f]{64}")
Identity = tuple[str, int, int, int, int, int]


class BuildRecord(TypedDict, total=False):
    """The record of a stage's last build, which doit stores. It is empty if the stage never ran.

    The fingerprint is `inputs`, `modules`, `external_inputs`, `settings` and `tools`: everything that the build
    depended on.

    inputs: digests of the files that the stage read, by path.
    modules: digests of the project's source modules, by dotted name.
    external_inputs: digests of the files outside the project, by the name that the stage gives them.
    settings: the keys of the spec that the stage used, as plain data.
    tools: versions of distributions, and facts about this machine, by name.
    outputs, sizes: digest and number of bytes of each target, by path. A folder has no size.
    notes: figures and messages about the result, for the reporter and for the report.
    seconds: the time that the stage took, on the machine where it ran.
    fetched: who built it, when, and the seconds of the transfer, if it came from the build cache.
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
    fetched: dict[str, Any]


# A record without one of these was written by another version of this project.
FINGERPRINT_KEYS = {"inputs", "modules", "external_inputs", "settings", "tools"}


@functools.cache
def imported_digests(modules: tuple[str, ...]) -> dict[str, str]:
    """Digests of source modules, by dotted name.

    Taken once, when the stage is declared: so it is the digest of the code that was imported, even if the file is
    edited later. Cached per tuple, since many models share the same tuple.
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
    """The modules whose source file has changed since this process imported it."""
    return [module for module, before in imported_digests(modules).items() if digest(source_path(module)) != before]


def changed_settings(model: Model, before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """The settings that differ, named as in the spec (`onnx.opset`) where possible.

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
            change = _difference(str(old), str(new)) if digests else f"{_format_setting(old)} -> {_format_setting(new)}"
            reasons.append(f"{name}: {change}")
    return reasons


def _format_setting(value: Any) -> str:
    """Return a setting as JSON, which has the form of TOML for strings, numbers, booleans and lists of them."""
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)


def changed_tools(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The tools of this machine whose version has changed since the build."""
    return [
        f"{tool}: {before.get(tool) or 'none'} -> {version or 'none'}"
        for tool, version in now.items()
        if before.get(tool) != version
    ]


def changed_content(before: Mapping[str, str], now: Mapping[str, str | None]) -> list[str]:
    """The files or modules that are new, are missing or have changed since the build, sorted by name."""
    return [
        f"{name}: {_difference(before.get(name), now.get(name))}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def changed_external_inputs(before: Mapping[str, str | None], paths: Mapping[str, str | None]) -> list[str]:
    """The files outside the project that have changed. A file that this machine does not have counts as unchanged."""
    return [
        f"{name}: changed"
        for name, path in paths.items()
        if path is not None and digest(path) not in (None, before.get(name))
    ]


def changed_outputs(record: BuildRecord, paths: Iterable[str]) -> list[str]:
    """The targets that have changed since the build."""
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


def read_identities(paths: Iterable[str | None]) -> dict[str, list[Identity]]:
    """The identities of all files at or below these paths, as `changed_identities` compares them.

    Files in build/ are not included. Only this project writes them, always as a whole, and another run may replace one
    by the same content, or publish it, which changes its ctime.
    """
    return {path: _identities(path) for path in paths if path is not None and not path.startswith(f"{BUILD}/")}


def changed_identities(before: Mapping[str, list[Identity]]) -> list[str]:
    """The paths at which a file was exchanged or written since `read_identities`, even if its content is back."""
    return [path for path, identities in before.items() if _identities(path) != identities]


def _identities(path: str) -> list[Identity]:
    """(path, device, inode, size, mtime, ctime) of the file at a path, or of each file below a folder."""
    try:
        status = os.stat(path)
    except OSError:
        return []
    if stat.S_ISDIR(status.st_mode):
        names = sorted({*os.listdir(path)} - {"__pycache__"})
        return [identity for name in names for identity in _identities(f"{path}/{name}")]
    return [(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)]


class UpToDate:
    """doit's `uptodate` of a stage.

    `doit info TASK` prints it, and so shows the reasons why the task would run.

    Args:
        changes: Lists the differences between a record and the current state.
    """

    __signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in ("task", "values")]
    )  # precomputed: doit would call inspect.signature for each task

    def __init__(self, changes: Callable[[BuildRecord], list[str]]):
        self.changes = changes
        self.reasons: list[str] = []

    def __call__(self, task: Any, values: BuildRecord) -> bool:
        try:
            self.reasons = self.changes(values)
        except OSError as error:  # a file cannot be read: then only this stage fails, with this error
            self.reasons = [str(error)]
        return not self.reasons

    def __repr__(self) -> str:
        return "; ".join(self.reasons)


def spec_key_of(model: Model, key: str, value: Any) -> str:
    """Return the key of the spec that a setting comes from, with its table, for example onnx.opset.

    The table is found by search: it is the only one in which `key` has this `value`. Return `key` without a table if no
    table or several have it, or if `key` is also a top-level key or the name of a table.
    """
    tables = {name: getattr(model.spec, name) for name in model.spec.__struct_fields__}
    tables["torchscript"] = model.torchscript  # with its defaults, which depend on another table
    found = [
        name for name, table in tables.items() if isinstance(table, Table) and getattr(table, key, NO_VALUE) == value
    ]
    return f"{found[0]}.{key}" if len(found) == 1 and key not in tables else key


def file_size(path: str) -> int | None:
    """The size of a file in bytes; None for a folder, or if the path does not exist."""
    return os.path.getsize(path) if os.path.isfile(path) else None


def _difference(before: str | None, now: str | None) -> str:
    if before is None:
        return "new"
    if now is None:
        return "missing"
    return f"sha256 {before[:8]} -> {now[:8]}"
