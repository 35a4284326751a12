"""A dry run: the state of each task, and the reasons why it would run.

    tasks in the order of the chain ─► to run        something of its own has changed
                                       to fetch      likewise, and the build cache has the result
                                       may run       if a task before it changes a file that it reads
                                       up to date, ignored, not for this machine (or a dependency is not)

If only the targets of a stage were changed, it builds the same bytes again, so no task after it runs. If the inputs of
a stage changed, its result is not known before it runs. Often the result is the same, and no task after it runs.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from build_tasks.doit_plugin.state import is_ignored
from build_tasks.doit_plugin.task_graph import requested_tasks, required_tasks
from build_tasks.doit_plugin.task_state import TaskState
from build_tasks.runtime.digests import digest
from build_tasks.runtime.fingerprint import NEVER_BUILT, BuildRecord
from build_tasks.runtime.stage import Stage, stage_of
from build_tasks.text_table import format_size

LEFT_OUT = (TaskState.UNSUPPORTED, TaskState.UNSUPPORTED_DEPENDENCY, TaskState.IGNORED)
BY_COMMAND = "by the command `doit ignore`"


class Step(NamedTuple):
    """One task of a plan.

    reasons: Why it runs, may run or is left out.
    seconds: Its duration last time; None if it is not known.
    stage: Its stage; None if the task is no stage.
    """

    task: str
    state: TaskState
    reasons: list[str]
    seconds: float | None
    stage: Stage | None


def plan_steps(tasks: dict[str, Any], names: Iterable[str], records: Any, with_cache: bool = False) -> list[Step]:
    """Return a step for each of the tasks and their dependencies, in the order of the chain.

    Args:
        tasks: doit's tasks, by name. Its TaskControl has added the dependencies that follow from their files.
        names: The tasks on the command line.
        records: doit's dep_manager.
        with_cache: Whether to look the results of stages up in the build cache.
    """
    requested = requested_tasks(tasks, names)
    steps: dict[str, Step] = {}
    outputs: dict[str, str | None] = {}  # digests of targets that will be written; None where it cannot be predicted
    for name in required_tasks(tasks, names):
        task = tasks[name]
        left_out = [dep for dep in task.task_dep if dep in steps and steps[dep].state in LEFT_OUT]
        same_bytes = False
        if left_out:
            ignored = [dep for dep in left_out if steps[dep].state == TaskState.IGNORED]
            state = TaskState.IGNORED if ignored else TaskState.UNSUPPORTED_DEPENDENCY
            reasons = [depends_on(ignored) if ignored else f"depends on {', '.join(left_out)}"]
        elif is_ignored(records, task):
            state, reasons = TaskState.IGNORED, [BY_COMMAND]
        else:
            state, reasons, same_bytes = predict(task, tasks, records, outputs)
        stage = stage_of(task)
        values = records.get_values(name)
        if with_cache and stage and state == TaskState.TO_RUN and (result := stage.cached_result(known(outputs))):
            state, written = TaskState.TO_FETCH, {path: result.outputs[n].digest for n, path in stage.outputs.items()}
            reasons.append(f"{format_size(result.size)}, {result.seconds:.1f} s where it was built")
            outputs |= written
        if stage and state == TaskState.TO_RUN and (missing := stage.missing_requirements()):
            state, reasons = TaskState.UNSUPPORTED, [] if name in requested else outdated(reasons)
            reasons.append(f"lacks {missing}")
        if stage and state in (TaskState.TO_RUN, TaskState.MAY_RUN):
            outputs |= {path: values["outputs"].get(path) if same_bytes else None for path in stage.outputs.values()}
        if task.actions or state in (TaskState.UNSUPPORTED_DEPENDENCY, TaskState.IGNORED):
            steps[name] = Step(name, state, reasons, values.get("seconds"), stage)
    return [step for step in steps.values() if tasks[step.task].actions]


def depends_on(ignored: list[str]) -> str:
    """Return the reason why a task is ignored that was not named in `doit ignore`."""
    return f"depends on {', '.join(ignored)}, which {'is' if len(ignored) == 1 else 'are'} ignored"


def predict(
    task: Any, tasks: dict[str, Any], records: Any, outputs: dict[str, str | None]
) -> tuple[TaskState, list[str], bool]:
    """Return the state of a task, the reasons, and whether doit would build the same bytes again.

    Args:
        outputs: Digests of the targets that tasks before it will write; None where that cannot be predicted.
    """
    stage = stage_of(task)
    if stage is None:
        current = not task.actions or records.get_status(task, tasks).status == "up-to-date"
        return TaskState.UP_TO_DATE if current else TaskState.TO_RUN, [], False
    values = records.get_values(task.name)
    try:
        stale, modified = stale_inputs(stage, values, outputs), stage.modified_outputs(values)
    except OSError as error:  # a file that cannot be read; the stage will fail with its name
        return TaskState.TO_RUN, [str(error)], False
    if stale or modified:
        return TaskState.TO_RUN, [*stale, *modified], stage.reproducible and not stale
    if changing := [path for path in dict.fromkeys(stage.dependency_paths()) if outputs.get(path, "") is None]:
        files = ", ".join(path.removeprefix(stage.model.artifact("")) for path in changing)
        return TaskState.MAY_RUN, [f"if {files} {'changes' if len(changing) == 1 else 'change'}"], False
    return TaskState.UP_TO_DATE, [], False


def known(outputs: dict[str, str | None]) -> Callable[[str], str | None]:
    """Return a function from a path to its digest after the tasks before, None if that cannot be predicted.

    Args:
        outputs: As in `predict`.
    """
    return lambda path: outputs[path] if path in outputs else digest(path)


def stale_inputs(stage: Stage, values: BuildRecord, outputs: dict[str, str | None]) -> list[str]:
    """Return why a stage is certainly stale. An input whose future content is unknown counts as unchanged."""

    def content(path: str) -> str | None:
        if path not in outputs:
            return digest(path)
        return outputs[path] or values["inputs"].get(path, "")

    return stage.stale_inputs(values, content)


def outdated(reasons: list[str]) -> list[str]:
    """Return the note that targets exist and are outdated; nothing if there are no targets."""
    return [] if reasons == [NEVER_BUILT] else [f"outdated ({reasons[0]})"]
