"""The result of a run: for each task, and for each requested model and format, as a table and as JSON."""

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from msgspec import Struct

from build_tasks import text_table
from build_tasks.doit_plugin.task_graph import required_tasks
from build_tasks.doit_plugin.task_state import TaskState
from build_tasks.paths import REPOSITORY
from build_tasks.runtime import atomic_files
from build_tasks.runtime.stage import Stage, stage_of

COLUMNS = ("model", "format", "size", "error", "time", "state")
EXPLAINED = (TaskState.UNSUPPORTED, TaskState.FAILED)  # states whose reasons stand below the table, in this order
MAX_NAMES = 3  # of the tasks that one failure prevented; of more than these, the number is shown


class TaskResult(Struct, frozen=True):
    """The result of one task.

    seconds: The duration; None where it did not run.
    reason: Why it failed, or was left out.
    notes: What its stage returned about the targets, in this run or in the one that built them.
    """

    state: TaskState
    seconds: float | None = None
    reason: str = ""
    notes: dict[str, Any] = {}  # never changed


class ModelRow(NamedTuple):
    """The result of one model in one format.

    bytes: The size of its artifact; None for an ensemble, which has none.
    accuracy: The error and its limit; None if no artifact was compared with limits.
    seconds: The duration of its stages. A stage that several formats need counts for the first of them.
    """

    model: str
    format: str
    name: str
    state: TaskState
    reason: str
    bytes: int | None
    accuracy: str | None
    seconds: float


def model_rows(tasks: dict[str, Any], required: Collection[str], results: dict[str, TaskResult]) -> list[ModelRow]:
    """Return a row for each Triton model and TensorRT-RTX engine of the run, in the order of the chain.

    Args:
        tasks: doit's tasks, by name.
        required: Names of the tasks of the run, with their dependencies.
        results: The results by task.
    """
    last_tasks = [
        name for kind in ("publish", "rtx") for name in tasks if name in required and name.startswith(f"{kind}:")
    ]
    stages = {name: stage for name in last_tasks if (stage := stage_of(tasks[name]))}
    models = list(dict.fromkeys(stage.model.name for stage in stages.values()))
    rows: list[ModelRow] = []
    counted: set[str] = set()
    for name, stage in sorted(stages.items(), key=lambda item: models.index(item[1].model.name)):
        kind, chain = name.partition(":")[0], required_tasks(tasks, [name])
        state, reason = final_state(name, chain, results)
        seconds = [results[task].seconds or 0 for task in chain if task in results and task not in counted]
        counted.update(chain)
        rows.append(
            ModelRow(
                model=stage.model.name,
                format=stage.settings["format"] if kind == "publish" else kind,
                name=stage.settings["name"] if kind == "publish" else stage.model.name,
                state=state,
                reason=reason,
                bytes=artifact_size(stage, kind),
                accuracy=format_accuracy(chain, results),
                seconds=sum(seconds),
            )
        )
    return rows


def final_state(name: str, chain: Iterable[str], results: dict[str, TaskResult]) -> tuple[TaskState, str]:
    """Return the state of a model, and the reason for it, from the results of its chain of tasks."""
    for state in (TaskState.FAILED, TaskState.UNSUPPORTED):
        if tasks := [task for task in sorted(chain) if task in results and results[task].state == state]:
            task, reason = tasks[0], results[tasks[0]].reason
            return state, f"{task}: {reason}" if state == TaskState.FAILED else reason
    if name not in results:
        return TaskState.NOT_FINISHED, ""
    return results[name].state, results[name].reason


def artifact_size(stage: Stage, kind: str) -> int | None:
    """Return the bytes of the files that a model is served from; None if it has none of its own."""
    if kind == "rtx":
        paths = [stage.outputs["engine"]]
    elif stage.settings["format"] == "ensemble":
        paths = []
    else:
        paths = [stage.inputs[file] for file in stage.settings["files"]]
    return sum(atomic_files.size(path) or 0 for path in paths) or None


def format_accuracy(chain: list[str], results: dict[str, TaskResult]) -> str | None:
    """Return the error and limit of the last artifact of a chain that the gate checked, as text.

    For an engine that was not measured, they belong to its graph; for an ensemble, to one of its steps.
    """
    for task in reversed([task for task in chain if task.startswith("accuracy:")]):
        if notes := results[task].notes if task in results else {}:
            return "not testable" if notes["accuracy"].startswith("not testable") else str(notes["error"])
    return None


def format_table(models: list[ModelRow], width: int | None) -> str:
    """Return the table at the end of a run. The reasons that `reason_lines` writes below it are left out.

    Args:
        width: Characters in a line, None for any number.
    """
    lines = []
    for row in models:
        size = "-" if row.bytes is None else text_table.format_size(row.bytes)
        subject, reason = split_reason(row)
        stage = subject.partition(":")[0] if row.state == TaskState.FAILED else ""
        detail = stage if row.state in EXPLAINED else reason
        state = f"{row.state}: {detail}" if detail else row.state
        lines.append([row.name, row.format, size, row.accuracy or "-", f"{row.seconds:.1f} s", state])
    return text_table.format_table(COLUMNS, lines, left=("format", "state"), width=width)


def reason_lines(models: list[ModelRow]) -> list[str]:
    """Return a line for each reason why models are not built: "failed: weights:net: … cannot be fetched"."""
    subjects: dict[tuple[TaskState, str], list[str]] = {}
    for row in models:
        subject, reason = split_reason(row)
        if row.state in EXPLAINED:
            subjects.setdefault((row.state, reason), []).append(subject)
    order = sorted(subjects, key=lambda key: EXPLAINED.index(key[0]))
    return [f"{state}: {', '.join(dict.fromkeys(subjects[state, reason]))}: {reason}" for state, reason in order]


def split_reason(row: ModelRow) -> tuple[str, str]:
    """Return what the first line of a reason is about, the failed task or else the model, and that line itself."""
    reason = row.reason.partition("\n")[0]
    if row.state == TaskState.FAILED:
        task, _, reason = reason.partition(": ")
        return task, reason
    return row.name, reason


def skipped_line(tasks: dict[str, Any], results: dict[str, TaskResult]) -> str | None:
    """Return the line on the tasks that a failure prevented, by the task that failed; None if there are none.

    A few tasks are named, of many their number is given.
    """
    skipped: dict[str, list[str]] = {}
    for name, result in results.items():
        if result.state == TaskState.FAILED_DEPENDENCY:
            needed = required_tasks(tasks, [name])
            failed = next((task for task in needed if task in results and results[task].state == TaskState.FAILED), "")
            skipped.setdefault(failed, []).append(name)
    parts = [
        ", ".join(names) if len(names) <= MAX_NAMES or not failed else f"{len(names)} tasks that need {failed}"
        for failed, names in skipped.items()
    ]
    return f"{TaskState.FAILED_DEPENDENCY}: {', '.join(parts)}" if parts else None


def next_commands(results: dict[str, TaskResult]) -> str | None:
    """Return the line that says where the models are, and what to type next; None if no model was published."""
    new = (TaskState.BUILT, TaskState.FETCHED)
    if not any(name.startswith("publish:") and result.state in new for name, result in results.items()):
        return None
    return f"the models are in {REPOSITORY}/; `doit serve` serves them, `doit report` shows all figures"


def as_data(models: list[ModelRow], results: dict[str, TaskResult]) -> dict[str, Any]:
    """Return models and tasks as data for JSON. Tables for people are left out."""
    tasks = {}
    for name, result in results.items():
        notes = {key: value for key, value in result.notes.items() if key != "table"}
        tasks[name] = {"state": result.state, "seconds": result.seconds, "reason": result.reason, "notes": notes}
    return {"models": [row._asdict() for row in models], "tasks": tasks}
