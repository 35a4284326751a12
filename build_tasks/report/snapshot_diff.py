"""The changes since the last report: a snapshot of each model in build/report.json, and the differences as text."""

from collections.abc import Callable
from typing import Any

import msgspec

from build_tasks.json_files import read_json
from build_tasks.paths import BUILD
from build_tasks.report.records import Change, FileSnapshot, GateRow, ModelPage, ModelSnapshot, Snapshot, TaskRow

SNAPSHOT = f"{BUILD}/report.json"
FIGURE_STAGES = ("measure", "accuracy", "summary")  # their files are compared as errors and gate results

# A duration has changed if it is so many times another, and differs by so many seconds.
MIN_DURATION_RATIO, MIN_DURATION_CHANGE = 1.25, 1.0


def read_snapshot() -> Snapshot:
    """The snapshots of the last report, without models that another version of the report has written."""
    try:
        content = read_json(SNAPSHOT)
        written, saved_models = content["written"], content["models"].items()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return Snapshot()
    models = {}
    for name, saved in saved_models:
        try:
            models[name] = msgspec.convert(saved, ModelSnapshot)
        except msgspec.ValidationError:
            continue
    return Snapshot(written, models)


def take_snapshot(tasks: list[TaskRow], gate_results: list[GateRow]) -> ModelSnapshot:
    """The snapshot of a model for the next report."""
    tools: dict[str, set[str]] = {}
    for task in tasks:
        for tool, version in task.tools.items():
            tools.setdefault(tool, set()).add(version)
    return ModelSnapshot(
        files={
            task.file: FileSnapshot(task.sha256, task.size)
            for task in tasks
            if task.sha256 and task.stage not in FIGURE_STAGES
        },
        errors={
            row.file: max(output["relative_l2"] for output in row.outputs.values())
            for row in gate_results
            if not any("wrong" in output for output in row.outputs.values())
        },
        statuses={row.file: row.status for row in gate_results},
        tools={tool: ", ".join(sorted(versions)) for tool, versions in sorted(tools.items())},
        seconds={task.task: task.seconds for task in tasks if task.seconds is not None},
    )


def next_snapshot(before: Snapshot, pages: list[ModelPage], written: float, models: list[str]) -> Snapshot:
    """The snapshot of this report.

    Args:
        before: The snapshot of the last report. Models that are not on the page keep theirs.
        pages: The models on the page.
        written: The time of this report, in seconds since 1970.
        models: The names of all models that have a spec. The snapshots of others are dropped.
    """
    kept = {name: snapshot for name, snapshot in before.models.items() if name in models}
    return Snapshot(written, {**kept, **{page.name: page.snapshot for page in pages}})


def describe_changes(before: ModelSnapshot | None, now: ModelSnapshot) -> list[Change] | None:
    """The changes since the last report, as text; None if this is the first report of the model."""
    if before is None:
        return None
    changes = []
    for field, describe in DESCRIPTIONS.items():
        old, new = getattr(before, field), getattr(now, field)
        for subject in (*new, *(subject for subject in old if subject not in new)):
            if (description := describe(old.get(subject), new.get(subject))) is not None:
                changes.append(Change(subject, description))
    return changes


def _describe_file(old: FileSnapshot | None, new: FileSnapshot | None) -> str | None:
    if old is None or new is None:
        return _new_or_gone(old, new)
    if old.sha256 == new.sha256:
        return None
    size = f", {old.size} → {new.size} bytes" if old.size != new.size else ""
    return f"sha256 {old.sha256[:8]}… → {new.sha256[:8]}…{size}"


def _describe_error(old: float | None, new: float | None) -> str | None:
    if old is None or new is None:
        return None  # the change of the file says it
    before, after = f"{old:.1e}", f"{new:.1e}"
    return f"error {before} → {after}" if before != after else None


def _describe_status(old: str | None, new: str | None) -> str | None:
    return f"{old} → {new}" if None not in (old, new) and old != new else None


def _describe_version(old: str | None, new: str | None) -> str | None:
    return _new_or_gone(old, new) or (f"{old} → {new}" if old != new else None)


def _describe_duration(old: float | None, new: float | None) -> str | None:
    if old is None or new is None:
        return None
    if abs(new - old) < MIN_DURATION_CHANGE or max(old, new) < MIN_DURATION_RATIO * min(old, new):
        return None
    return f"{old:.1f} s → {new:.1f} s"


def _new_or_gone(old: object, new: object) -> str | None:
    return "new" if old is None else "gone" if new is None else None


# By field of ModelSnapshot: how a difference is described, None if it is none.
DESCRIPTIONS: dict[str, Callable[[Any, Any], str | None]] = {
    "files": _describe_file,
    "errors": _describe_error,
    "statuses": _describe_status,
    "tools": _describe_version,
    "seconds": _describe_duration,
}
