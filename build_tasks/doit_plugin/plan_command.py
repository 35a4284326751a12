"""plan: `doit plan` shows what `doit` would do now, why, and how long that took last time; it writes nothing"""

import os
from typing import Any

from doit.cmd_base import DoitCmdBase
from doit.control import TaskControl

from build_tasks.doit_plugin.command_line import OneLineMistakes
from build_tasks.doit_plugin.dry_run import Step, plan_steps
from build_tasks.doit_plugin.state import ReadOnlyStateDB, StateManager
from build_tasks.doit_plugin.task_state import TaskState
from build_tasks.errors import printable
from build_tasks.runtime.digests import digest
from build_tasks.spec import model_files


class Plan(OneLineMistakes, DoitCmdBase):  # type: ignore[misc]  # doit has no types
    """The command."""

    doc_purpose = "what would run, why, and how long it took last time; builds nothing"
    doc_usage = "[TASK ...] [its options]"
    doc_description = (
        "A task that runs may write the same bytes as before. Then the tasks that read them do not run. They are shown "
        "as `may run`. Options behind a task, such as --engine_precision, are those of `doit run`."
    )

    def execute(self, params: Any, args: list[str]) -> Any:
        digest.remembers = False
        self.dep_manager = StateManager(ReadOnlyStateDB)
        return super().execute(params, args)

    def _execute(self) -> int:
        control = TaskControl(self.task_list)
        control.process(self.sel_tasks)
        plan = plan_steps(control.tasks, control.selected_tasks, self.dep_manager, with_cache=True)
        self.outstream.write(format_outside_files(plan) + format_plan(plan))
        return 0


LISTED = (TaskState.TO_FETCH, TaskState.TO_RUN, TaskState.MAY_RUN, TaskState.UNSUPPORTED, TaskState.IGNORED)
TIMED = (TaskState.TO_RUN, TaskState.MAY_RUN)


def format_outside_files(plan: list[Step]) -> str:
    """Return a line for each file or folder outside the model's folder that a spec names; see spec/model_files.py."""
    if model_files.VARIABLE not in os.environ:
        return ""
    from build_tasks.spec.source_checks import spec_paths

    models = {step.stage.model.name: step.stage.model for step in plan if step.stage}
    return printable(
        "".join(
            f"{model.file}: {named.key} leads to {path}, outside the model's folder\n"
            for model in models.values()
            for named in spec_paths(model)
            if (path := model_files.outside_path(model.name, named.path))
        )
    )


def format_plan(plan: list[Step]) -> str:
    """Return a line for each task that is not up to date, and a line with the totals."""
    rows = [(step.state, *step.task.partition(":")[::2], step) for step in plan if step.state in LISTED]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    is_timed = any(step.state in TIMED and step.seconds is not None for *_, step in rows)
    width = 9 if is_timed else 0  # of the durations
    text = ""
    for *cells, step in rows:
        title = "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
        seconds = f"{step.seconds:.1f} s" if step.state in TIMED and step.seconds is not None else ""
        text += f"{title}{seconds:>{width}}  {'; '.join(step.reasons)}".rstrip() + "\n"
    totals = [
        f"{len(group)} {state}{format_duration(group) if state in TIMED else ''}"
        for state in (TaskState.TO_FETCH, *TIMED, TaskState.UNSUPPORTED, TaskState.UP_TO_DATE)
        if (group := [step for step in plan if step.state == state])
    ]
    return printable(f"{text}{', '.join(totals) or 'nothing to do'}\n")


def format_duration(steps: list[Step]) -> str:
    """Return the time that steps took last: " (about 6.6 s, and 2 never timed)"; "" if none was timed."""
    known = [step.seconds for step in steps if step.seconds is not None]
    never = f", and {len(steps) - len(known)} never timed" if len(known) < len(steps) else ""
    return f" (about {sum(known):.1f} s{never})" if known else ""
