"""How a run ended: for each task, and for each model and format that was asked for, as a table and as JSON."""

import textwrap
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from build_tasks import files, tables
from build_tasks.stage import Stage, stage_of

BUILT, CURRENT, FAILED, BLOCKED = "built", "up to date", "failed", "blocked"
IGNORED, NOT_HERE, WITHOUT = "ignored", "skipped", "without"  # the last: it needs what is skipped
GROUPS_BY_NAME = ("engine", "rtx")  # to ask for one of these groups is to ask for every engine in it
COLUMNS = ("model", "format", "size", "error", "time", "state")


class Outcome(NamedTuple):
    """What became of a task.

    seconds: that it ran, where it did.
    reason: why it failed, or was left out.
    notes: what its stage tells, of whichever run built it.
    """

    state: str
    seconds: float | None = None
    reason: str = ""
    notes: dict[str, Any] = {}  # noqa: RUF012  # nobody writes to it


class Row(NamedTuple):
    """What became of one model in one format.

    bytes: of its artifact; None where there is none of its own.
    accuracy: the error, and its limit; None where nothing is judged.
    seconds: that its stages ran; what several formats need counts for the first of them.
    """

    model: str
    format: str
    name: str
    state: str
    reason: str
    bytes: int | None
    accuracy: str | None
    seconds: float


def rows(tasks: dict[str, Any], asked_for: Collection[str], ended: dict[str, Outcome]) -> list[Row]:
    """One for each model of Triton's, and each engine of TensorRT-RTX, that was to be built, in the order of the chain.

    tasks: doit's, by name.
    """
    last = [name for kind in ("publish", "rtx") for name in tasks if name in asked_for and name.startswith(f"{kind}:")]
    stages = {name: stage for name in last if (stage := stage_of(tasks[name]))}
    place = {model: index for index, model in enumerate(dict.fromkeys(stage.model.name for stage in stages.values()))}
    found: list[Row] = []
    counted: set[str] = set()
    for name, stage in sorted(stages.items(), key=lambda each: place[each[1].model.name]):
        kind, theirs = name.partition(":")[0], needed(tasks, [name])
        state, reason = became(name, theirs, ended)
        seconds = [ended[task].seconds or 0 for task in theirs if task in ended and task not in counted]
        counted.update(theirs)
        found.append(
            Row(
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


def became(name: str, theirs: Iterable[str], ended: dict[str, Outcome]) -> tuple[str, str]:
    """The state of a chain by that of its last task, and the reason of whichever task decided it."""
    for state in (FAILED, NOT_HERE):
        if found := [task for task in sorted(theirs) if task in ended and ended[task].state == state]:
            task, reason = found[0], ended[found[0]].reason
            return state, f"{task}: {reason}" if state == FAILED else reason
    if name not in ended:
        return "not finished", ""
    return ended[name].state, ended[name].reason


def size(stage: Stage, kind: str) -> int | None:
    """In bytes, of what a model is served from; None where that is nothing of its own."""
    if kind == "rtx":
        paths = [stage.outputs["engine"]]
    elif stage.settings["format"] == "ensemble":
        paths = []
    else:
        paths = [stage.inputs[file] for file in stage.settings["files"]]
    return sum(files.size(path) or 0 for path in paths) or None


def accuracy(theirs: list[str], ended: dict[str, Outcome]) -> str | None:
    """What was judged last of what a model is made from: itself, the graph of an engine, the steps of an ensemble."""
    for task in reversed([task for task in theirs if task.startswith("accuracy:")]):
        if notes := ended[task].notes if task in ended else {}:
            return str(notes["error"]) if notes["accuracy"] == "ok" else "not testable"
    return None


def needed(tasks: dict[str, Any], names: Iterable[str]) -> list[str]:
    """These tasks, and all that they need, each behind what it needs."""
    seen: set[str] = set()
    ordered: list[str] = []

    def visit(name: str) -> None:
        if name not in seen:
            seen.add(name)
            for dep in tasks[name].task_dep:
                visit(dep)
            ordered.append(name)

    for name in names:
        visit(name)
    return ordered


def asked(tasks: dict[str, Any], selected: Iterable[str]) -> set[str]:
    """The tasks that were asked for by name, stage by stage, and all that they need: not those of a whole model."""
    return set(needed(tasks, [name for name in selected if tasks[name].actions or name in GROUPS_BY_NAME]))


def told(models: list[Row], width: int) -> str:
    """The table at the end of a run, of some characters at most: of long reasons the beginning."""
    lines = []
    for row in models:
        bytes = "-" if row.bytes is None else tables.size(row.bytes)
        why = row.reason.partition("\n")[0]
        state = f"{row.state}: {why}" if why else row.state
        lines.append([row.name, row.format, bytes, row.accuracy or "-", f"{row.seconds:.1f} s", state])
    others = [max(map(len, column)) for column in list(zip(*[COLUMNS, *lines], strict=True))[:-1]]
    room = max(width - sum(others) - 3 * len(others) - 2, 20)
    for line in lines:
        line[-1] = textwrap.shorten(line[-1], room, placeholder=" …")
    return tables.table(COLUMNS, lines, left=("format", "state"))


def as_data(models: list[Row], ended: dict[str, Outcome]) -> dict[str, Any]:
    """The same for machines, with every task."""
    tasks = {}
    for name, (state, seconds, reason, notes) in ended.items():
        said = {key: value for key, value in notes.items() if key != "table"}
        tasks[name] = {"state": state, "seconds": seconds, "reason": reason, "notes": said}
    return {"models": [row._asdict() for row in models], "tasks": tasks}
