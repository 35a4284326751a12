"""What doit would do with each task now, and why.

    tasks in the order of the chain ─► run           something of its own has changed
                                       may run       if what runs before it changes what it reads
                                       up to date, not here, without what is not here, ignored

A stage whose targets alone were damaged gives the same bytes again, and nothing behind it runs. What a changed stage
gives is not known before it has run; often it is what was there, and the rebuild ends with it.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from build_tasks.doit_plugin.task_graph import requested_tasks, required_tasks
from build_tasks.runtime.digests import digest
from build_tasks.runtime.stage import NEVER_BUILT, Stage, stage_of, unsupported_message

RUN, MAY_RUN, CURRENT, IGNORED = "run", "may run", "up to date", "ignored"
NOT_HERE, WITHOUT = "not here", "without"  # the second: it needs what is not for this machine


class Step(NamedTuple):
    """One task of a plan.

    reasons: why it runs, may run or is left out.
    seconds: what it took last time, None where that is not known.
    stage: None of a task that is no stage.
    """

    task: str
    state: str
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
        left_out = [dep for dep in task.task_dep if dep in found and found[dep].state in (NOT_HERE, WITHOUT, IGNORED)]
        again = False
        if left_out:
            ignored = any(found[dep].state == IGNORED for dep in left_out)
            state, reasons = IGNORED if ignored else WITHOUT, [f"needs {', '.join(left_out)}"]
        elif records.status_is_ignore(task):
            state, reasons = IGNORED, ["as `doit ignore` was told"]
        else:
            state, reasons, again = predict(task, tasks, records, made)
        stage = stage_of(task)
        values = records.get_values(name)
        if stage and state == RUN and (lacks := stage.missing_requirements()):
            state, reasons = NOT_HERE, [*([] if name in named else outdated(reasons)), unsupported_message(lacks)]
        if stage and state in (RUN, MAY_RUN):
            made |= {path: values["outputs"].get(path) if again else None for path in stage.outputs.values()}
        if task.actions or state in (WITHOUT, IGNORED):
            found[name] = Step(name, state, reasons, values.get("seconds"), stage)
    return [step for step in found.values() if tasks[step.task].actions]


def predict(task: Any, tasks: dict[str, Any], records: Any, made: dict[str, str | None]) -> tuple[str, list[str], bool]:
    """What doit will do with a task, why, and whether that gives the bytes again that were there."""
    stage = stage_of(task)
    if stage is None:
        current = not task.actions or records.get_status(task, tasks).status == "up-to-date"
        return CURRENT if current else RUN, [], False
    values = records.get_values(task.name)
    try:
        changed, damaged = causes(stage, values, made), stage.modified_outputs(values)
    except OSError as error:  # a file that may not be read: the stage will say so
        return RUN, [str(error)], False
    if changed or damaged:
        return RUN, [*changed, *damaged], stage.reproducible and not changed
    if changing := [path for path in dict.fromkeys(stage.dependency_paths()) if made.get(path, "") is None]:
        files = ", ".join(path.removeprefix(stage.model.artifact("")) for path in changing)
        return MAY_RUN, [f"if {files} {'changes' if len(changing) == 1 else 'change'}"], False
    return CURRENT, [], False


def causes(stage: Stage, values: dict[str, Any], made: dict[str, str | None]) -> list[str]:
    """What is sure to have changed: a file that cannot be foreseen is taken for the same."""

    def content(path: str) -> str | None:
        if path not in made:
            return digest(path)
        return made[path] or values["inputs"].get(path, "")

    return stage.stale_inputs(values, content)


def outdated(reasons: list[str]) -> list[str]:
    return [] if reasons == [NEVER_BUILT] else [f"outdated ({reasons[0]})"]
