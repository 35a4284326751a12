"""What doit says while it runs, and three duties that only a reporter can do.

A reporter hears of every success right after doit has noted it: here it is written to disk at once, so that a kill
loses nothing that took time. It hears what was asked for before anything runs: here what this machine cannot build, and
nobody named, is passed over as if `doit ignore` had been told. And it has the last word of a run: here the exit code
becomes what the design promises (a task that could not run because another failed is no crash).
"""

import atexit
import contextlib
import json
import os
import shutil
import signal
import sqlite3
import sys
import threading
import time
from collections import Counter
from types import FrameType
from typing import Any, TextIO

from doit.exceptions import BaseFail, TaskFailed, UnmetDependency
from doit.globals import Globals

from build_tasks.doit_plugin import display, dry_run, run_results, task_graph
from build_tasks.doit_plugin.noop_cache import noop_cache
from build_tasks.doit_plugin.task_state import TaskState
from build_tasks.paths import BUILD, STATE_DB
from build_tasks.runtime import progress, resources, worker
from build_tasks.runtime.digests import digest
from build_tasks.runtime.fingerprint import NEVER_BUILT
from build_tasks.runtime.stage import stage_of, unsupported_message

WIDEST = 160  # characters of a reason, which `doit info` tells in full, and of a table in a log
SOON = 0.1  # seconds
COUNTED = (TaskState.BUILT, TaskState.UP_TO_DATE, TaskState.UNSUPPORTED, TaskState.FAILED)
FORESEEN = 200  # tasks that are judged a second time, which takes less than a needless import


class Reporter:
    """doit's reporter protocol; see doit/reporter.py, ConsoleReporter."""

    desc = "a line when a stage starts and one when it ends; the models at the end"

    def __init__(self, outstream: TextIO, options: dict[str, Any]):
        self.out = outstream
        self.ended: dict[str, run_results.TaskResult] = {}  # by task, in the order in which they ended
        self.fails: list[BaseFail] = []
        self.tasks: dict[str, Any] = {}
        self.asked_for: set[str] = set()  # the tasks of this run, with all that they need
        self.selected: set[str] = set()  # the tasks that were named, or stand in DOIT_CONFIG
        self.named: set[str] = set()
        self.passed_over: dict[str, str] = {}  # what was said of tasks that this machine cannot build
        self.aborted: list[str] = []
        self.noted = 0.0  # when doit's table was last written, by time.monotonic
        self.foreseen = False  # which stages may run, for which heavy libraries are then imported
        self.width = 0
        self.display = self.shown()

    def shown(self) -> display.NullDisplay:
        watched = self.out.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        return display.LiveDisplay(self.out, self.tally) if watched else display.LogDisplay(self.out)

    def initialize(self, tasks: Any, selected_tasks: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.interrupted)
        self.tasks = tasks
        self.selected = set(selected_tasks)
        for line in (line for record in noop_cache.models.values() for line in record.said):
            self.display.say(line)
        self.asked_for = set(task_graph.required_tasks(tasks, selected_tasks))
        self.named = task_graph.requested_tasks(tasks, selected_tasks)
        self.width = max((len(name.partition(":")[2]) for name in self.asked_for), default=0)
        worker.expected_stages = {name.partition(":")[0] for name in self.asked_for}
        records = Globals.dep_manager
        self.told_status, records.get_status = records.get_status, self.status
        self.told_to_ignore, records.status_is_ignore = records.status_is_ignore, self.ignores
        self.told_to_forget, records.remove_success = records.remove_success, self.forget
        self.told_to_close, records.close = records.close, self.close
        worker.listener = self.hear
        atexit.register(self.display.close)  # whatever happens, the terminal gets its cursor back

    def status(self, task: Any, tasks: Any, get_log: bool = False) -> Any:
        """doit's get_status; before the first stage that needs a process, it is foreseen which others may follow."""
        found = self.told_status(task, tasks, get_log)
        if found.status == "run" and not self.foreseen and (stage := stage_of(task)) and not stage.in_process:
            self.foreseen = True
            if len(self.asked_for) <= FORESEEN:
                worker.expected_stages = self.to_come()
        return found

    def to_come(self) -> set[str]:
        """The stages that may run."""
        records = Globals.dep_manager
        records.status_is_ignore = self.told_to_ignore  # to look ahead says nothing
        steps = dry_run.plan_steps(self.tasks, self.selected, records)
        records.status_is_ignore = self.ignores
        return {step.task.partition(":")[0] for step in steps if step.state in (TaskState.TO_RUN, TaskState.MAY_RUN)}

    def ignores(self, task: Any) -> bool:
        """doit's status_is_ignore."""
        return self.told_to_ignore(task) or self.pass_over(task)

    def hear(self, task: str, message: progress.Message) -> None:
        """What a stage tells while it runs."""
        if isinstance(message, str):
            self.display.say(message)
        else:
            self.display.get_on(task, message)

    def tally(self) -> str:
        """Where the run is as a whole, for a terminal."""
        count = sum(bool(self.tasks[name].actions) for name in self.asked_for)
        done = sum(bool(self.tasks[name].actions) for name in list(self.ended))  # which grows in another thread
        return f"{done} of {count} tasks done"

    def pass_over(self, task: Any) -> bool:
        """Whether this machine cannot build what the task stands for, and nobody asked for it by name."""
        stage = stage_of(task)
        if stage is None or task.name in self.named or not (lacks := stage.missing_requirements()):
            return False
        values = Globals.dep_manager.get_values(task.name)
        reasons = [reason for check, _, _ in task.uptodate if not check(task, values) for reason in check.reasons]
        if not reasons:
            return False
        outdated = "" if reasons == [NEVER_BUILT] else f"outdated ({reasons[0]}), and "
        self.ended[task.name] = run_results.TaskResult(TaskState.UNSUPPORTED, reason=f"lacks {lacks}")
        self.passed_over[task.name] = f"– {self.title(task)} {outdated}{unsupported_message(lacks)}"
        self.display.say(self.passed_over[task.name])
        return True

    def interrupted(self, number: int, frame: FrameType | None) -> None:
        """An orderly end: stages in flight are discarded, what is finished stays finished."""
        signal.signal(number, signal.SIG_DFL)
        self.aborted.append(f"interrupted by {signal.Signals(number).name}; what was finished is kept")
        raise SystemExit(128 + number)

    def get_status(self, task: Any) -> None:
        pass

    def execute_task(self, task: Any) -> None:
        if not task.actions:
            return
        if stage_of(task):
            last = Globals.dep_manager.get_values(task.name).get("seconds")
            self.display.begin(task.name, self.title(task), last, _cause(task))
        else:  # what it runs may write to the terminal itself
            self.display.pause()
            self.display.say(f"  {self.title(task).rstrip()} ...")

    def add_success(self, task: Any) -> None:
        if task.actions:
            self.note(task)
            seconds = task.values.get("seconds")
            said = task.values.get("notes", {})
            self.ended[task.name] = run_results.TaskResult(TaskState.BUILT, seconds, notes=said)
            notes = ", ".join(f"{key}: {_told(value)}" for key, value in said.items() if key != "table")
            line = f"✓ {self.title(task)} {'' if seconds is None else f'{seconds:6.1f} s'}  {notes}".rstrip()
            self.display.end(task.name)
            self.display.say(line)
            self.show_table(task, said)

    def note(self, task: Any) -> None:
        """Write what doit knows to disk; of tasks of a few milliseconds one after the other, not after each."""
        light, now = (stage := stage_of(task)) is not None and stage.in_process, time.monotonic()
        if not light or now - self.noted > SOON:
            with contextlib.suppress(sqlite3.OperationalError):  # a full disk, say; see `close`
                remember(Globals.dep_manager)
            digest.save()
            self.noted = now

    def forget(self, task: Any) -> None:
        """doit's remove_success, of a task that failed. On a full disk its old record stays, and fits it no more."""
        with contextlib.suppress(sqlite3.OperationalError):
            self.told_to_forget(task)

    def close(self) -> None:
        """doit's close, its last chance to write what it knows."""
        try:
            self.told_to_close()
        except sqlite3.OperationalError as error:
            reason = (
                f"{resources.full_disk(BUILD) or error}; what was built last is not recorded, and will be built again"
            )
            self.fails.append(TaskFailed(reason))
            self.display.say(f"✗ {STATE_DB}: {reason}", failure=True)

    def show_table(self, task: Any, notes: dict[str, Any]) -> None:
        """What is worth more than a line, to whoever asked for this stage by name, built anew or not."""
        if "table" in notes and not self.selected.isdisjoint((task.name, task.subtask_of)):
            self.display.show(notes["table"])

    def add_failure(self, task: Any, fail: BaseFail) -> None:
        if not task.actions:  # a group is its tasks
            return
        self.display.end(task.name)
        reason = str(fail.get_msg()).strip()
        if isinstance(fail, UnmetDependency):
            self.ended[task.name] = run_results.TaskResult(TaskState.FAILED_DEPENDENCY)
            return
        self.fails.append(fail)
        self.ended[task.name] = run_results.TaskResult(TaskState.FAILED, reason=reason)
        self.display.say(f"✗ {self.title(task)} {reason}", failure=True)

    def skip_uptodate(self, task: Any) -> None:
        if task.actions:
            notes = Globals.dep_manager.get_values(task.name).get("notes", {})
            self.ended[task.name] = run_results.TaskResult(TaskState.UP_TO_DATE, notes=notes)
            self.show_table(task, notes)

    def skip_ignore(self, task: Any) -> None:
        if task.name in self.ended:
            return  # said already
        if any(self.state(dep) in (TaskState.UNSUPPORTED, TaskState.UNSUPPORTED_DEPENDENCY) for dep in task.task_dep):
            self.ended[task.name] = run_results.TaskResult(TaskState.UNSUPPORTED_DEPENDENCY)
            return
        ignored = [dep for dep in task.task_dep if self.state(dep) == TaskState.IGNORED]
        reason = dry_run.BY_COMMAND if self.told_to_ignore(task) else dry_run.depends_on(ignored)
        self.ended[task.name] = run_results.TaskResult(TaskState.IGNORED, reason=reason)
        self.display.say(f"! {self.title(task)} {TaskState.IGNORED}: {reason}")

    def state(self, task: str) -> TaskState | None:
        return self.ended[task].state if task in self.ended else None

    def cleanup_error(self, exception: BaseFail) -> None:
        sys.stderr.write(exception.get_msg())

    def runtime_error(self, msg: str) -> None:
        self.aborted.append(msg)

    def teardown_task(self, task: Any) -> None:
        pass

    def complete_run(self) -> None:
        self.display.close()
        noop_cache.note(self.tasks, self.ended, self.passed_over)
        self.conclude()
        if self.fails and not self.aborted:
            raise SystemExit(1 if all(isinstance(fail, TaskFailed) for fail in self.fails) else 2)

    def conclude(self) -> None:
        """The models, where anything was done, and how many tasks ended how."""
        if {TaskState.BUILT, TaskState.FAILED} & {ended.state for ended in self.ended.values()}:
            others = (row for record in noop_cache.models.values() for row in record.models)
            models = [*run_results.model_rows(self.tasks, self.asked_for, self.ended), *others]
            if models:
                width = shutil.get_terminal_size().columns if self.out.isatty() else WIDEST
                self.display.show(run_results.format_table(sorted(models, key=lambda row: row.model), width))
        for line in self.sums():
            self.display.say(line)

    def sums(self) -> list[str]:
        states = Counter(ended.state for ended in self.ended.values())
        for record in noop_cache.models.values():
            states.update(record.counts)
        counts = [f"{states[state]} {state}" for state in COUNTED if states[state]]
        blocked = [name for name, ended in self.ended.items() if ended.state == TaskState.FAILED_DEPENDENCY]
        return [
            ", ".join(counts) or "nothing to do",
            *([f"{TaskState.FAILED_DEPENDENCY}: {', '.join(blocked)}"] if blocked else []),
            *self.aborted,
        ]

    def title(self, task: Any) -> str:
        stage, _, name = task.name.partition(":")
        return f"{stage:<12} {name:<{self.width}}"


class Quiet(Reporter):
    """`doit -r quiet`: what failed, and the sums."""

    def shown(self) -> display.NullDisplay:
        return display.FailuresDisplay(self.out)

    def conclude(self) -> None:
        for line in self.sums():
            self.out.write(f"{line}\n")


class Json(Reporter):
    """`doit -r json`: one JSON object at the end, alone on standard output."""

    def shown(self) -> display.NullDisplay:
        return display.NullDisplay()

    def initialize(self, tasks: Any, selected_tasks: Any) -> None:
        super().initialize(tasks, selected_tasks)
        self.aside = contextlib.redirect_stdout(sys.stderr)  # what tasks print
        self.aside.__enter__()

    def conclude(self) -> None:
        self.aside.__exit__(None, None, None)
        models = run_results.model_rows(self.tasks, self.asked_for, self.ended)
        told = {**run_results.as_data(models, self.ended), "aborted": self.aborted}
        self.out.write(json.dumps(told, indent=1) + "\n")


def remember(dep_manager: Any) -> None:
    """Write what doit knows to its sqlite file, now; doit itself does so only at the end of a run.

    This is SqliteDB.dump of doit 0.37 without its last step, which closes the file.
    """
    backend = dep_manager.backend
    for task_id in backend._dirty:
        row = task_id, backend.codec.encode(backend._cache[task_id])
        backend._conn.execute("insert or replace into doit values (?, ?)", row)
    backend._conn.commit()
    backend._dirty.clear()


def _cause(task: Any) -> str:
    """Why a task runs that has run before: the first reason of its stage's fingerprint."""
    reasons = [reason for check, _, _ in task.uptodate for reason in getattr(check, "reasons", [])]
    if not reasons or reasons == [NEVER_BUILT]:
        return ""
    first = reasons[0] if len(reasons[0]) <= WIDEST else f"{reasons[0][:WIDEST]} …"
    return first + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "")


def _told(value: object) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)
