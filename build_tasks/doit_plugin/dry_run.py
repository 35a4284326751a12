"""What doit would do with each task now, and why.

    tasks in the order of the chain ─► to run        something of its own has changed
                                       may run       if a task before it changes what it reads
                                       up to date, ignored, not for this machine (or a dependency is not)

A stage whose targets alone were damaged gives the same bytes again, and nothing behind it runs. What a changed stage
gives is not known before it has run; often it is what was there, and the rebuild ends with it.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from build_tasks.doit_plugin.state import is_ignored
from build_tasks.doit_plugin.task_graph import requested_tasks, required_tasks
from build_tasks.doit_plugin.task_state import TaskState
from build_tasks.runtime.digests import digest
from build_tasks.runtime.fingerprint import NEVER_BUILT, BuildRecord
from build_tasks.runtime.stage import Stage, stage_of

LEFT_OUT = (TaskState.UNSUPPORTED, TaskState.UNSUPPORTED_DEPENDENCY, TaskState.IGNORED)
BY_COMMAND = "by the command `doit ignore`"


class Step(NamedTuple):
    """One task of a plan.

    reasons: why it runs, may run or is left out.
    seconds: what it took last time, None where that is not known.
    stage: None of a task that is no stage.
    """

    task: str
    state: TaskState
    reasons: list[str]
    seconds: float | None
    stage: Stage | None


def plan_steps(tasks: dict[str, Any], names: Iterable[str], records: Any) -> list[Step]:
    """The tasks that these need, in the order of the chain, and what doit would do with each.

    tasks: doit's, by name, after its TaskControl has added what follows from their files.
    records: doit's dep_manager, which knows what was built.
    """
    named = requested_tasks(tasks, names)
    found: dict[str, Step] = {}
    made: dict[str, str | None] = {}  # what is going to be written: its digest, None where that cannot be foreseen
    for name in required_tasks(tasks, names):
        task = tasks[name]
        left_out = [dep for dep in task.task_dep if dep in found and found[dep].state in LEFT_OUT]
        again = False
        if left_out:
            ignored = [dep for dep in left_out if found[dep].state == TaskState.IGNORED]
            state = TaskState.IGNORED if ignored else TaskState.UNSUPPORTED_DEPENDENCY
            reasons = [depends_on(ignored) if ignored else f"depends on {', '.join(left_out)}"]
        elif is_ignored(records, task):
            state, reasons = TaskState.IGNORED, [BY_COMMAND]
        else:
            state, reasons, again = predict(task, tasks, records, made)
        stage = stage_of(task)
        values = records.get_values(name)
        if stage and state == TaskState.TO_RUN and (lacks := stage.missing_requirements()):
            state, reasons = TaskState.UNSUPPORTED, [*([] if name in named else outdated(reasons)), f"lacks {lacks}"]
        if stage and state in (TaskState.TO_RUN, TaskState.MAY_RUN):
            made |= {path: values["outputs"].get(path) if again else None for path in stage.outputs.values()}
        if task.actions or state in (TaskState.UNSUPPORTED_DEPENDENCY, TaskState.IGNORED):
            found[name] = Step(name, state, reasons, values.get("seconds"), stage)
    return [step for step in found.values() if tasks[step.task].actions]


def depends_on(ignored: list[str]) -> str:
    """The reason why a task is ignored that `doit ignore` did not name."""
    return f"depends on {', '.join(ignored)}, which {'is' if len(ignored) == 1 else 'are'} ignored"


def predict(
    task: Any, tasks: dict[str, Any], records: Any, made: dict[str, str | None]
) -> tuple[TaskState, list[str], bool]:
    """What doit will do with a task, why, and whether that gives the bytes again that were there."""
    stage = stage_of(task)
    if stage is None:
        current = not task.actions or records.get_status(task, tasks).status == "up-to-date"
        return TaskState.UP_TO_DATE if current else TaskState.TO_RUN, [], False
    values = records.get_values(task.name)
    try:
        changed, damaged = causes(stage, values, made), stage.modified_outputs(values)
    except OSError as error:  # a file that may not be read: the stage will say so
        return TaskState.TO_RUN, [str(error)], False
    if changed or damaged:
        return TaskState.TO_RUN, [*changed, *damaged], stage.reproducible and not changed
    if changing := [path for path in dict.fromkeys(stage.dependency_paths()) if made.get(path, "") is None]:
        files = ", ".join(path.removeprefix(stage.model.artifact("")) for path in changing)
        return TaskState.MAY_RUN, [f"if {files} {'changes' if len(changing) == 1 else 'change'}"], False
    return TaskState.UP_TO_DATE, [], False


def causes(stage: Stage, values: BuildRecord, made: dict[str, str | None]) -> list[str]:
    """What is sure to have changed: a file that cannot be foreseen is taken for the same."""

    def content(path: str) -> str | None:
        if path not in made:
            return digest(path)
        return made[path] or values["inputs"].get(path, "")

    return stage.stale_inputs(values, content)


def outdated(reasons: list[str]) -> list[str]:
    return [] if reasons == [NEVER_BUILT] else [f"outdated ({reasons[0]})"]
