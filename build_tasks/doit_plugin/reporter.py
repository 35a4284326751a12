"""What doit says while it runs, and three duties that only a reporter can do.

A reporter hears of every success right after doit has noted it: here it is written to disk at once, so that a kill
loses nothing that took time. It hears what was asked for before anything runs: here what this machine cannot build, and
nobody named, is passed over as if `doit ignore` had been told. And it has the last word of a run: here the exit code
becomes what the design promises (a task that could not run because another failed is no crash).
"""

import atexit
import contextlib
import json
import shutil
import signal
import sqlite3
import sys
import threading
import time
from collections import Counter
from types import FrameType
from typing import Any, TextIO

from doit.exceptions import BaseFail, InvalidDodoFile, TaskFailed, UnmetDependency
from doit.globals import Globals

from build_tasks.doit_plugin import display, dry_run, noop_record, run_results, task_graph
from build_tasks.doit_plugin.noop_cache import noop_cache
from build_tasks.doit_plugin.state import StateManager, is_ignored
from build_tasks.doit_plugin.task_state import TaskState, format_counts
from build_tasks.paths import BUILD, STATE_DB
from build_tasks.runtime import progress, resources, worker
from build_tasks.runtime.digests import digest
from build_tasks.runtime.fingerprint import NEVER_BUILT
from build_tasks.runtime.stage import stage_of, unsupported_message

WIDEST = 160  # characters of a reason, which `doit info` tells in full, and of a table in a log
SOON = 0.1  # seconds
OTHER_RUN_COMMAND = "tasks are run by this project's `doit run` with SQLite: run `pip install -r requirements.txt`"
FORESEEN = 200  # tasks that are judged a second time, which takes less than a needless import


class Reporter:
    """doit's reporter protocol; see doit/reporter.py, ConsoleReporter."""

    desc = "a line when a stage starts and one when it ends; the models at the end"

    def __init__(self, outstream: TextIO, options: dict[str, Any]):
        if not isinstance(Globals.dep_manager, StateManager):
            raise InvalidDodoFile(OTHER_RUN_COMMAND)
        self.records: StateManager = Globals.dep_manager
        self.records.backend.connect()
        self.out = outstream
        self.ended: dict[str, run_results.TaskResult] = {}  # by task, in the order in which they ended
        self.fails: list[BaseFail] = []
        self.tasks: dict[str, Any] = {}
        self.asked_for: set[str] = set()  # the tasks of this run, with all that they need
        self.selected: set[str] = set()  # the tasks that were named, or stand in DOIT_CONFIG
        self.named: set[str] = set()
        self.messages: dict[str, str] = {}  # what was said of tasks that this machine cannot build
        self.aborted: list[str] = []
        self.saved = 0.0  # when doit's records were last written, by time.monotonic
        self.foreseen = False  # which stages may run, for which heavy libraries are then imported
        self.width = 0
        self.display = self.create_display()

    def create_display(self) -> display.NullDisplay:
        return display.create(self.out, self.tally)

    def initialize(self, tasks: Any, selected_tasks: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.interrupted)
        self.tasks = tasks
        self.selected = set(selected_tasks)
        for line in (line for record in noop_cache.unchanged.values() for line in record.messages):
            self.display.say(line)
        self.asked_for = set(task_graph.required_tasks(tasks, selected_tasks))
        self.named = task_graph.requested_tasks(tasks, selected_tasks)
        self.width = max((len(name.partition(":")[2]) for name in self.asked_for), default=0)
        worker.expected_stages = {name.partition(":")[0] for name in self.asked_for}
        self.records.observer = self
        worker.listener = self.hear
        atexit.register(self.display.close)  # whatever happens, the terminal gets its cursor back

    def before_stale_task(self, task: Any) -> None:
        """Before the first stage that needs a process, predict which other stages may follow it."""
        if not self.foreseen and (stage := stage_of(task)) and not stage.in_process:
            self.foreseen = True
            if len(self.asked_for) <= FORESEEN:
                steps = dry_run.plan_steps(self.tasks, self.selected, self.records)
                may_run = [step for step in steps if step.state in (TaskState.TO_RUN, TaskState.MAY_RUN)]
                worker.expected_stages = {step.task.partition(":")[0] for step in may_run}

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

    def skip_unsupported(self, task: Any) -> bool:
        """Return whether this machine cannot build a stage that is outdated and was not requested by name."""
        stage = stage_of(task)
        if stage is None or task.name in self.named or not (lacks := stage.missing_requirements()):
            return False
        values = self.records.get_values(task.name)
        reasons = [reason for check, _, _ in task.uptodate if not check(task, values) for reason in check.reasons]
        if not reasons:
            return False
        outdated = "" if reasons == [NEVER_BUILT] else f"outdated ({reasons[0]}), and "
        self.ended[task.name] = run_results.TaskResult(TaskState.UNSUPPORTED, reason=f"lacks {lacks}")
        self.messages[task.name] = f"– {self.title(task)} {outdated}{unsupported_message(lacks)}"
        self.display.say(self.messages[task.name])
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
            last = self.records.get_values(task.name).get("seconds")
            self.display.begin(task.name, self.title(task), last, _cause(task))
        else:  # what it runs may write to the terminal itself
            self.display.pause()
            self.display.say(f"  {self.title(task).rstrip()} ...")

    def add_success(self, task: Any) -> None:
        if task.actions:
            self.save_state(task)
            seconds = task.values.get("seconds")
            said = task.values.get("notes", {})
            self.ended[task.name] = run_results.TaskResult(TaskState.BUILT, seconds, notes=said)
            notes = ", ".join(f"{key}: {_told(value)}" for key, value in said.items() if key != "table")
            line = f"✓ {self.title(task)} {'' if seconds is None else f'{seconds:6.1f} s'}  {notes}".rstrip()
            self.display.end(task.name)
            self.display.say(line)
            self.show_table(task, said)

    def save_state(self, task: Any) -> None:
        """Write doit's records to disk. After tasks that take milliseconds this is done only once in a while."""
        stage, now = stage_of(task), time.monotonic()
        if stage is None or not stage.in_process or now - self.saved > SOON:
            self.records.save()
            digest.save()
            self.saved = now

    def state_not_saved(self, error: sqlite3.OperationalError) -> None:
        reason = f"{resources.full_disk(BUILD) or error}; what was built last is not recorded, and will be built again"
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
            notes = self.records.get_values(task.name).get("notes", {})
            self.ended[task.name] = run_results.TaskResult(TaskState.UP_TO_DATE, notes=notes)
            self.show_table(task, notes)

    def skip_ignore(self, task: Any) -> None:
        if task.name in self.ended:
            return  # said already
        if any(self.state(dep) in (TaskState.UNSUPPORTED, TaskState.UNSUPPORTED_DEPENDENCY) for dep in task.task_dep):
            self.ended[task.name] = run_results.TaskResult(TaskState.UNSUPPORTED_DEPENDENCY)
            return
        ignored = [dep for dep in task.task_dep if self.state(dep) == TaskState.IGNORED]
        reason = dry_run.BY_COMMAND if is_ignored(self.records, task) else dry_run.depends_on(ignored)
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
        noop_record.update(noop_cache, self.tasks, self.ended, self.messages, self.records.backend.row_digests)
        self.conclude()
        if self.fails and not self.aborted:
            raise SystemExit(1 if all(isinstance(fail, TaskFailed) for fail in self.fails) else 2)

    def conclude(self) -> None:
        """The models, where anything was done, and how many tasks ended how."""
        if {TaskState.BUILT, TaskState.FAILED} & {ended.state for ended in self.ended.values()}:
            others = (run_results.ModelRow(*row) for record in noop_cache.unchanged.values() for row in record.rows)
            models = [*run_results.model_rows(self.tasks, self.asked_for, self.ended), *others]
            if models:
                width = shutil.get_terminal_size().columns if self.out.isatty() else WIDEST
                self.display.show(run_results.format_table(sorted(models, key=lambda row: row.model), width))
        for line in self.sums():
            self.display.say(line)

    def sums(self) -> list[str]:
        states: Counter[str] = Counter(ended.state for ended in self.ended.values())
        for record in noop_cache.unchanged.values():
            states.update(record.counts)
        blocked = [name for name, ended in self.ended.items() if ended.state == TaskState.FAILED_DEPENDENCY]
        return [
            format_counts(states),
            *([f"{TaskState.FAILED_DEPENDENCY}: {', '.join(blocked)}"] if blocked else []),
            *self.aborted,
        ]

    def title(self, task: Any) -> str:
        stage, _, name = task.name.partition(":")
        return f"{stage:<12} {name:<{self.width}}"


class Quiet(Reporter):
    """`doit -r quiet`: what failed, and the sums."""

    def create_display(self) -> display.NullDisplay:
        return display.FailuresDisplay(self.out)

    def conclude(self) -> None:
        for line in self.sums():
            self.out.write(f"{line}\n")


class Json(Reporter):
    """`doit -r json`: one JSON object at the end, alone on standard output."""

    def create_display(self) -> display.NullDisplay:
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


def _cause(task: Any) -> str:
    """Why a task runs that has run before: the first reason of its stage's fingerprint."""
    reasons = [reason for check, _, _ in task.uptodate for reason in getattr(check, "reasons", [])]
    if not reasons or reasons == [NEVER_BUILT]:
        return ""
    first = reasons[0] if len(reasons[0]) <= WIDEST else f"{reasons[0][:WIDEST]} …"
    return first + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "")


def _told(value: object) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)
