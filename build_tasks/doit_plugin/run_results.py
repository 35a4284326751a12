"""How a run ended: for each task, and for each model and format that was asked for, as a table and as JSON."""

import textwrap
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from build_tasks import text_table
from build_tasks.doit_plugin.task_graph import required_tasks
from build_tasks.doit_plugin.task_state import TaskState
from build_tasks.runtime import atomic_files
from build_tasks.runtime.stage import Stage, stage_of

COLUMNS = ("model", "format", "size", "error", "time", "state")


class TaskResult(NamedTuple):
    """What became of a task.

    seconds: that it ran, where it did.
    reason: why it failed, or was left out.
    notes: what its stage tells, of whichever run built it.
    """

    state: TaskState
    seconds: float | None = None
    reason: str = ""
    notes: dict[str, Any] = {}  # noqa: RUF012  # nobody writes to it


class ModelRow(NamedTuple):
    """What became of one model in one format.

    bytes: of its artifact; None where there is none of its own.
    accuracy: the error, and its limit; None where nothing is judged.
    seconds: that its stages ran; what several formats need counts for the first of them.
    """

    model: str
    format: str
    name: str
    state: TaskState
    reason: str
    bytes: int | None
    accuracy: str | None
    seconds: float


def model_rows(tasks: dict[str, Any], asked_for: Collection[str], ended: dict[str, TaskResult]) -> list[ModelRow]:
    """One for each model of Triton's, and each engine of TensorRT-RTX, that was to be built, in the order of the chain.

    tasks: doit's, by name.
    """
    last = [name for kind in ("publish", "rtx") for name in tasks if name in asked_for and name.startswith(f"{kind}:")]
    stages = {name: stage for name in last if (stage := stage_of(tasks[name]))}
    place = {model: index for index, model in enumerate(dict.fromkeys(stage.model.name for stage in stages.values()))}
    found: list[ModelRow] = []
    counted: set[str] = set()
    for name, stage in sorted(stages.items(), key=lambda each: place[each[1].model.name]):
        kind, theirs = name.partition(":")[0], required_tasks(tasks, [name])
        state, reason = final_state(name, theirs, ended)
        seconds = [ended[task].seconds or 0 for task in theirs if task in ended and task not in counted]
        counted.update(theirs)
        found.append(
            ModelRow(
                model=stage.model.name,
                format=stage.settings["format"] if kind == "publish" else kind,
                name=stage.settings["name"] if kind == "publish" else stage.model.name,
                state=state,
                reason=reason,
                bytes=size(stage, kind),
                accuracy=accuracy(theirs, ended),
                seconds=sum(seconds),
            )
        )
    return found


def final_state(name: str, theirs: Iterable[str], ended: dict[str, TaskResult]) -> tuple[TaskState, str]:
    """The state of a chain by that of its last task, and the reason of whichever task decided it."""
    for state in (TaskState.FAILED, TaskState.UNSUPPORTED):
        if found := [task for task in sorted(theirs) if task in ended and ended[task].state == state]:
            task, reason = found[0], ended[found[0]].reason
            return state, f"{task}: {reason}" if state == TaskState.FAILED else reason
    if name not in ended:
        return TaskState.NOT_FINISHED, ""
    return ended[name].state, ended[name].reason


def size(stage: Stage, kind: str) -> int | None:
    """In bytes, of what a model is served from; None where that is nothing of its own."""
    if kind == "rtx":
        paths = [stage.outputs["engine"]]
    elif stage.settings["format"] == "ensemble":
        paths = []
    else:
        paths = [stage.inputs[file] for file in stage.settings["files"]]
    return sum(atomic_files.size(path) or 0 for path in paths) or None


def accuracy(theirs: list[str], ended: dict[str, TaskResult]) -> str | None:
    """What was judged last of what a model is made from: itself, the graph of an engine, the steps of an ensemble."""
    for task in reversed([task for task in theirs if task.startswith("accuracy:")]):
        if notes := ended[task].notes if task in ended else {}:
            return str(notes["error"]) if notes["accuracy"] == "ok" else "not testable"
    return None


def format_table(models: list[ModelRow], width: int) -> str:
    """The table at the end of a run, of some characters at most: of long reasons the beginning."""
    lines = []
    for row in models:
        shown_size = "-" if row.bytes is None else text_table.format_size(row.bytes)
        why = row.reason.partition("\n")[0]
        state = f"{row.state}: {why}" if why else row.state
        lines.append([row.name, row.format, shown_size, row.accuracy or "-", f"{row.seconds:.1f} s", state])
    others = [max(map(len, column)) for column in list(zip(*[COLUMNS, *lines], strict=True))[:-1]]
    room = max(width - sum(others) - 3 * len(others) - 2, 20)
    for line in lines:
        line[-1] = textwrap.shorten(line[-1], room, placeholder=" …")
    return text_table.format_table(COLUMNS, lines, left=("format", "state"))


def as_data(models: list[ModelRow], ended: dict[str, TaskResult]) -> dict[str, Any]:
    """The same for machines, with every task."""
    tasks = {}
    for name, (state, seconds, reason, notes) in ended.items():
        said = {key: value for key, value in notes.items() if key != "table"}
        tasks[name] = {"state": state, "seconds": seconds, "reason": reason, "notes": said}
    return {"models": [row._asdict() for row in models], "tasks": tasks}
