"""plan: what `doit` would do now, why, and how long that took last time; it writes nothing

    tasks in the order of the chain ─► run           something of its own has changed
                                       may run       if what runs before it changes what it reads
                                       up to date, not here, without what is not here, ignored

A stage whose targets alone were damaged gives the same bytes again, and nothing behind it runs. What a changed stage
gives is not known before it has run; often it is what was there, and the rebuild ends with it.
"""

import os
import sqlite3
from collections.abc import Iterable
from typing import Any, NamedTuple

from doit.cmd_base import DoitCmdBase
from doit.control import TaskControl
from doit.dependency import Dependency, SqliteDB

from build_tasks.digests import ContentChecker, digest
from build_tasks.outcome import asked, needed
from build_tasks.spec import RECORDS
from build_tasks.stage import NEVER_BUILT, Stage, not_here, stage_of

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


def steps(tasks: dict[str, Any], names: Iterable[str], records: Any) -> list[Step]:
    """The tasks that these need, in the order of the chain, and what doit would do with each.

    tasks: doit's, by name, after its TaskControl has added what follows from their files.
    records: doit's dep_manager, which knows what was built.
    """
    named = asked(tasks, names)
    found: dict[str, Step] = {}
    made: dict[str, str | None] = {}  # what is going to be written: its digest, None where that cannot be foreseen
    for name in needed(tasks, names):
        task = tasks[name]
        left_out = [dep for dep in task.task_dep if dep in found and found[dep].state in (NOT_HERE, WITHOUT, IGNORED)]
        again = False
        if left_out:
            ignored = any(found[dep].state == IGNORED for dep in left_out)
            state, reasons = IGNORED if ignored else WITHOUT, [f"needs {', '.join(left_out)}"]
        elif records.status_is_ignore(task):
            state, reasons = IGNORED, ["as `doit ignore` was told"]
        else:
            state, reasons, again = judged(task, tasks, records, made)
        stage = stage_of(task)
        values = records.get_values(name)
        if stage and state == RUN and (lacks := stage.lacking()):
            state, reasons = NOT_HERE, [*([] if name in named else outdated(reasons)), not_here(lacks)]
        if stage and state in (RUN, MAY_RUN):
            made |= {path: values["outputs"].get(path) if again else None for path in stage.outputs.values()}
        if task.actions or state in (WITHOUT, IGNORED):
            found[name] = Step(name, state, reasons, values.get("seconds"), stage)
    return [step for step in found.values() if tasks[step.task].actions]


def judged(task: Any, tasks: dict[str, Any], records: Any, made: dict[str, str | None]) -> tuple[str, list[str], bool]:
    """What doit will do with a task, why, and whether that gives the bytes again that were there."""
    stage = stage_of(task)
    if stage is None:
        current = not task.actions or records.get_status(task, tasks).status == "up-to-date"
        return CURRENT if current else RUN, [], False
    values = records.get_values(task.name)
    try:
        changed, damaged = causes(stage, values, made), stage.damage(values)
    except OSError as error:  # a file that may not be read: the stage will say so
        return RUN, [str(error)], False
    if changed or damaged:
        return RUN, [*changed, *damaged], stage.reproducible and not changed
    if changing := [path for path in dict.fromkeys(stage.watched()) if made.get(path, "") is None]:
        files = ", ".join(path.removeprefix(stage.model.artifact("")) for path in changing)
        return MAY_RUN, [f"if {files} {'changes' if len(changing) == 1 else 'change'}"], False
    return CURRENT, [], False


def causes(stage: Stage, values: dict[str, Any], made: dict[str, str | None]) -> list[str]:
    """What is sure to have changed: a file that cannot be foreseen is taken for the same."""

    def content(path: str) -> str | None:
        if path not in made:
            return digest(path)
        return made[path] or values["inputs"].get(path, "")

    return stage.causes(values, content)


def outdated(reasons: list[str]) -> list[str]:
    return [] if reasons == [NEVER_BUILT] else [f"outdated ({reasons[0]})"]


class Records(SqliteDB):  # type: ignore[misc]  # doit has no types
    """doit's records, read into memory."""

    def _sqlite3(self, name: str) -> Any:
        memory = super()._sqlite3(":memory:")
        if os.path.exists(name):
            source = sqlite3.connect(f"file:{name}?mode=ro", uri=True)
            source.backup(memory)
            source.close()
        return memory


class Plan(DoitCmdBase):  # type: ignore[misc]  # doit has no types
    """The command."""

    doc_purpose = "what would run, why, and how long it took last time; builds nothing"
    doc_usage = "[TASK ...] [its options]"
    doc_description = (
        "A task that runs may rewrite its targets as they were; what reads them then does not run, and is shown as "
        "`maybe`. Options behind a task, such as --engine_precision, are those of `doit run`."
    )

    def execute(self, params: Any, args: list[str]) -> Any:
        digest.remembers = False
        self.dep_manager = Dependency(Records, RECORDS, checker_cls=ContentChecker)
        return super().execute(params, args)

    def _execute(self) -> int:
        control = TaskControl(self.task_list)
        control.process(self.sel_tasks)
        self.outstream.write(told(steps(control.tasks, control.selected_tasks, self.dep_manager)))
        return 0


MARKS = {RUN: "run", MAY_RUN: "maybe", NOT_HERE: "–", IGNORED: "ignored"}


def told(plan: list[Step]) -> str:
    """A line for each task that is not up to date, and the sums."""
    shown = [(MARKS[step.state], *step.task.partition(":")[::2], step) for step in plan if step.state in MARKS]
    widths = [max((len(line[column]) for line in shown), default=0) for column in range(3)]
    text = ""
    for *cells, step in shown:
        title = " ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
        seconds = "" if step.state in (NOT_HERE, IGNORED) or step.seconds is None else f"{step.seconds:.1f} s"
        text += f"{title} {seconds:>8}  {'; '.join(step.reasons)}".rstrip() + "\n"
    sums = []
    for state, what in ((RUN, "to run"), (MAY_RUN, "that may run"), (NOT_HERE, "not for this machine")):
        if group := [step for step in plan if step.state == state]:
            known = [step.seconds for step in group if step.seconds is not None]
            unknown = f", and {len(group) - len(known)} never timed" if len(known) < len(group) else ""
            time = f" (about {sum(known):.1f} s{unknown})" if known and state != NOT_HERE else ""
            sums.append(f"{len(group)} {what}{time}")
    current = sum(step.state == CURRENT for step in plan)
    return text + ", ".join([*sums, *([f"{current} up to date"] if current else [])] or ["nothing to do"]) + "\n"
