"""plan: `doit plan`, which tells what `doit` would do now, why, and how long that took last time; it writes nothing"""

from typing import Any

from doit.cmd_base import DoitCmdBase
from doit.control import TaskControl

from build_tasks.doit_plugin.dry_run import Step, plan_steps
from build_tasks.doit_plugin.state import ReadOnlyStateDB, StateManager
from build_tasks.doit_plugin.task_state import TaskState
from build_tasks.runtime.digests import digest


class Plan(DoitCmdBase):  # type: ignore[misc]  # doit has no types
    """The command."""

    doc_purpose = "what would run, why, and how long it took last time; builds nothing"
    doc_usage = "[TASK ...] [its options]"
    doc_description = (
        "A task that runs may rewrite its targets as they were; what reads them then does not run, and is shown as "
        "`may run`. Options behind a task, such as --engine_precision, are those of `doit run`."
    )

    def execute(self, params: Any, args: list[str]) -> Any:
        digest.remembers = False
        self.dep_manager = StateManager(ReadOnlyStateDB)
        return super().execute(params, args)

    def _execute(self) -> int:
        control = TaskControl(self.task_list)
        control.process(self.sel_tasks)
        self.outstream.write(told(plan_steps(control.tasks, control.selected_tasks, self.dep_manager)))
        return 0


LISTED = (TaskState.TO_RUN, TaskState.MAY_RUN, TaskState.UNSUPPORTED, TaskState.IGNORED)


def told(plan: list[Step]) -> str:
    """A line for each task that is not up to date, and the sums."""
    shown = [(step.state, *step.task.partition(":")[::2], step) for step in plan if step.state in LISTED]
    widths = [max((len(line[column]) for line in shown), default=0) for column in range(3)]
    text = ""
    for *cells, step in shown:
        title = " ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
        seconds = (
            ""
            if step.state not in (TaskState.TO_RUN, TaskState.MAY_RUN) or step.seconds is None
            else f"{step.seconds:.1f} s"
        )
        text += f"{title} {seconds:>8}  {'; '.join(step.reasons)}".rstrip() + "\n"
    sums = []
    for state in (TaskState.TO_RUN, TaskState.MAY_RUN, TaskState.UNSUPPORTED):
        if group := [step for step in plan if step.state == state]:
            known = [step.seconds for step in group if step.seconds is not None]
            unknown = f", and {len(group) - len(known)} never timed" if len(known) < len(group) else ""
            time = f" (about {sum(known):.1f} s{unknown})" if known and state != TaskState.UNSUPPORTED else ""
            sums.append(f"{len(group)} {state}{time}")
    current = sum(step.state == TaskState.UP_TO_DATE for step in plan)
    return (
        text
        + ", ".join([*sums, *([f"{current} {TaskState.UP_TO_DATE}"] if current else [])] or ["nothing to do"])
        + "\n"
    )
