"""The reporter: the output of a run, and three tasks that only a reporter can do.

- doit calls it after every success. It saves doit's records at once, so that a killed run keeps all finished tasks.
- It knows which tasks were requested. It leaves out stages that this machine cannot build and that were not requested
  by name, as if `doit ignore` had marked them.
- It runs last, and sets the exit code: 1 if a task failed, 2 if one crashed. A task after a failed one did neither.
"""

import atexit
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from types import FrameType
from typing import Any, TextIO

from doit.exceptions import BaseFail, InvalidDodoFile, TaskFailed, UnmetDependency
from doit.globals import Globals

from build_tasks import text_table
from build_tasks.doit_plugin import display, noop_record, run_results, standard_streams, task_graph, task_lines
from build_tasks.doit_plugin.noop_cache import PRUNE, noop_cache
from build_tasks.doit_plugin.state import StateManager, is_ignored
from build_tasks.doit_plugin.state_file import StateError
from build_tasks.doit_plugin.task_state import TaskState, format_counts
from build_tasks.paths import FAILURES
from build_tasks.runtime import progress, worker
from build_tasks.runtime.digests import digest
from build_tasks.runtime.stage import stage_of, unsupported_message

SAVE_INTERVAL = 0.1  # seconds between two saves of doit's records after short tasks
OTHER_RUN_COMMAND = (
    "this project needs its own command `doit run` with SQLite records: run `pip install -r requirements.txt`"
)
UNCOUNTED = (TaskState.UNSUPPORTED_DEPENDENCY, TaskState.IGNORED)  # `doit plan` leaves them out of its totals, too
PREDICTION_LIMIT = 200  # tasks; to predict more takes longer than to import libraries that are not needed


class Reporter:
    """doit's reporter protocol; see doit/reporter.py, ConsoleReporter."""

    desc = "a line when a stage starts and one when it ends; the models at the end"

    def __init__(self, outstream: TextIO, options: dict[str, Any]):
        if not isinstance(Globals.dep_manager, StateManager):
            raise InvalidDodoFile(OTHER_RUN_COMMAND)
        self.records: StateManager = Globals.dep_manager
        self.records.backend.connect()
        self.out = outstream
        self.results: dict[str, run_results.TaskResult] = {}  # by task, in the order in which tasks ended
        self.failures: list[BaseFail] = []
        self.tasks: dict[str, Any] = {}
        self.required: set[str] = set()  # the tasks of this run, with their dependencies
        self.selected: set[str] = set()  # the tasks on the command line, or the default ones
        self.requested: set[str] = set()  # see task_graph.requested_tasks
        self.messages: dict[str, str] = {}  # the lines on tasks that this machine cannot build
        self.aborted: list[str] = []
        self.saved = time.monotonic()  # when the run began, or doit's records were last written
        self.predicted = False  # whether worker.expected_stages holds only stages that may run
        self.expected: set[str] | None = None  # the tasks that are counted; None before they are known
        self.width = 0
        self.prune_is_ignored = False
        self.cache_line = ""  # what the run got from the build cache
        self.display = self.create_display()

    def create_display(self) -> display.NullDisplay:
        return display.create(self.out, self.format_totals)

    def initialize(self, tasks: Any, selected_tasks: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.interrupted)
        self.tasks = tasks
        self.selected = set(selected_tasks)
        for line in (line for record in noop_cache.unchanged.values() for line in record.messages):
            self.display.write(line)
        self.required = set(task_graph.required_tasks(tasks, selected_tasks))
        self.requested = task_graph.requested_tasks(tasks, selected_tasks)
        self.width = max((len(name.partition(":")[2]) for name in self.required), default=0)
        worker.expected_stages = {name.partition(":")[0] for name in self.required}
        self.prune_is_ignored = is_ignored(self.records, tasks[PRUNE])
        self.records.observer = self
        worker.listener = self.on_message
        progress.listener = self.display.write
        atexit.register(self.display.close)  # restores the cursor of the terminal in every case

    def before_stale_task(self, task: Any) -> None:
        """Before the first stage that needs a process, predict which other stages may follow it."""
        if not self.predicted and (stage := stage_of(task)) and not stage.in_process:
            self.predicted = True
            self.expected = {name for name in self.required if self.tasks[name].actions}
            if len(self.required) <= PREDICTION_LIMIT:
                from build_tasks.doit_plugin import dry_run

                steps = dry_run.plan_steps(self.tasks, self.selected, self.records)
                self.expected = {step.task for step in steps if step.state not in UNCOUNTED}
                may_run = [step for step in steps if step.state in (TaskState.TO_RUN, TaskState.MAY_RUN)]
                worker.expected_stages = {step.task.partition(":")[0] for step in may_run}

    def on_message(self, task: str, message: progress.Message) -> None:
        """Show a message of a running stage."""
        if isinstance(message, str):
            self.display.write(message)
        else:
            self.display.update(task, message)

    def format_totals(self) -> str:
        """Return the line with the totals of the run, for a terminal. `doit plan` counts the same tasks."""
        if self.expected is None:
            return ""
        cached = sum(sum(record.counts.values()) for record in noop_cache.unchanged.values())
        done = sum(name in self.expected for name in list(self.results))  # a copy: another thread adds to it
        return f"{cached + done} of {cached + len(self.expected)} tasks done"

    def skip_unsupported(self, task: Any) -> bool:
        """Return whether this machine cannot build a stage that is outdated and was not requested by name."""
        stage = stage_of(task)
        if stage is None or task.name in self.requested or not (missing := stage.missing_requirements()):
            return False
        values = self.records.get_values(task.name)
        reasons = [reason for check, _, _ in task.uptodate if not check(task, values) for reason in check.reasons]
        if not reasons or stage.cached_result():
            return False
        outdated = "" if reasons == [task_lines.NEVER_BUILT] else f"outdated ({reasons[0]}), and "
        self.results[task.name] = run_results.TaskResult(TaskState.UNSUPPORTED, reason=f"lacks {missing}")
        self.messages[task.name] = f"– {self.title(task)} {outdated}{unsupported_message(missing)}"
        self.display.write(self.messages[task.name])
        return True

    def interrupted(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: end the run. Running stages are discarded, finished ones are kept."""
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
            self.display.begin(task.name, self.title(task), last, task_lines.stale_reason(task))
        else:  # because its commands may write to the terminal
            self.display.pause()
            self.display.write(f"  {self.title(task).rstrip()} ...")

    def add_success(self, task: Any) -> None:
        if task.actions:
            self.save_state(task)
            seconds = task.values.get("seconds")
            notes = task.values.get("notes", {})
            text = task_lines.format_notes(notes)
            state = TaskState.BUILT
            if fetched := task.values.get("fetched"):
                state = TaskState.FETCHED
                text = ", ".join(filter(None, (f"fetched ({seconds:.1f} s where it was built)", text)))
                seconds = fetched["seconds"]
            self.results[task.name] = run_results.TaskResult(state, seconds, notes=notes)
            line = f"✓ {self.title(task)} {'' if seconds is None else f'{seconds:6.1f} s'}  {text}".rstrip()
            self.display.end(task.name)
            self.display.write(line)
            self.write_notes_table(task, notes)

    def save_state(self, task: Any) -> None:
        """Write doit's records to disk. After tasks that take milliseconds this is done only once in a while."""
        stage, now = stage_of(task), time.monotonic()
        if stage is None or not stage.in_process or now - self.saved > SAVE_INTERVAL:
            self.records.save()
            digest.save()
            self.saved = now

    def state_not_saved(self, error: StateError) -> None:
        reason = f"{error}; what was built last is not recorded, and will be built again"
        self.failures.append(TaskFailed(reason))
        self.display.write(f"✗ {reason}", failure=True)

    def write_notes_table(self, task: Any, notes: dict[str, Any]) -> None:
        """Write the table of a stage that was requested by name, whether it was built in this run or before."""
        if "table" in notes and not self.selected.isdisjoint((task.name, task.subtask_of)):
            table = notes["table"]  # text, or a text_table.Table that was saved as JSON
            is_text = isinstance(table, str)
            width = text_table.terminal_width(self.out)
            self.display.write_table(table if is_text else text_table.Table(*table).format(width))

    def add_failure(self, task: Any, fail: BaseFail) -> None:
        if not task.actions:  # a group, whose tasks report for themselves
            return
        self.display.end(task.name)
        reason = str(fail.get_msg()).strip()
        if isinstance(fail, UnmetDependency):
            self.results[task.name] = run_results.TaskResult(TaskState.FAILED_DEPENDENCY)
            return
        self.failures.append(fail)
        self.results[task.name] = run_results.TaskResult(TaskState.FAILED, reason=reason)
        self.display.write(f"✗ {self.title(task)} {reason}", failure=True)

    def skip_uptodate(self, task: Any) -> None:
        if task.actions:
            notes = self.records.get_values(task.name).get("notes", {})
            self.results[task.name] = run_results.TaskResult(TaskState.UP_TO_DATE, notes=notes)
            self.write_notes_table(task, notes)

    def skip_ignore(self, task: Any) -> None:
        if task.name in self.results:
            return  # `skip_unsupported` has reported it
        if any(self.state(dep) in (TaskState.UNSUPPORTED, TaskState.UNSUPPORTED_DEPENDENCY) for dep in task.task_dep):
            self.results[task.name] = run_results.TaskResult(TaskState.UNSUPPORTED_DEPENDENCY)
            self.records.get_values(task.name)  # reads the record, whose digest the no-op cache needs
            return
        from build_tasks.doit_plugin import dry_run

        ignored = [dep for dep in task.task_dep if self.state(dep) == TaskState.IGNORED]
        reason = dry_run.BY_COMMAND if is_ignored(self.records, task) else dry_run.depends_on(ignored)
        self.results[task.name] = run_results.TaskResult(TaskState.IGNORED, reason=reason)
        self.display.write(f"! {self.title(task)} {TaskState.IGNORED}: {reason}")

    def state(self, task: str) -> TaskState | None:
        return self.results[task].state if task in self.results else None

    def cleanup_error(self, exception: BaseFail) -> None:
        sys.stderr.write(exception.get_msg())

    def runtime_error(self, msg: str) -> None:
        self.aborted.append(msg)

    def teardown_task(self, task: Any) -> None:
        pass

    def complete_run(self) -> None:
        self.display.close()
        if os.environ.get("BUILD_CACHE"):
            from build_tasks.runtime import build_cache

            self.cache_line = build_cache.of_run().finish(wait=not self.aborted)
        noop_record.update(
            noop_cache,
            self.tasks,
            self.results,
            self.messages,
            self.records.backend.row_digests,
            self.prune_is_ignored,
        )
        self.save_failures()
        self.write_end()
        if self.failures and not self.aborted:
            raise SystemExit(1 if all(isinstance(fail, TaskFailed) for fail in self.failures) else 2)

    def save_failures(self) -> None:
        """Record what failed, for the report. A run without failures imports nothing for it, if none failed before."""
        if self.failures or os.path.exists(FAILURES):
            from build_tasks.doit_plugin import failures

            failures.update(self.results)

    def write_end(self) -> None:
        """Write the table of models, if anything was built or failed, and the number of tasks by state."""
        if {TaskState.BUILT, TaskState.FETCHED, TaskState.FAILED} & {result.state for result in self.results.values()}:
            others = (run_results.ModelRow(*row) for record in noop_cache.unchanged.values() for row in record.rows)
            models = [*run_results.model_rows(self.tasks, self.required, self.results), *others]
            if models:
                rows = sorted(models, key=lambda row: row.model)
                self.display.write_table(run_results.format_table(rows, text_table.terminal_width(self.out)))
                for reason in run_results.reason_lines(rows):
                    self.display.write(reason)
            if line := run_results.next_commands(self.results):
                self.display.write(line)
        for line in self.summary_lines():
            self.display.write(line)

    def summary_lines(self) -> list[str]:
        states: Counter[str] = Counter(result.state for result in self.results.values())
        for record in noop_cache.unchanged.values():
            states.update(record.counts)
        skipped = run_results.skipped_line(self.tasks, self.results)
        return [
            format_counts(states),
            *([skipped] if skipped else []),
            *([self.cache_line] if self.cache_line else []),
            *self.aborted,
        ]

    def title(self, task: Any) -> str:
        stage, _, name = task.name.partition(":")
        return f"{stage:<12} {name:<{self.width}}"


class Quiet(Reporter):
    """`doit -r quiet`: the failures, and the totals."""

    def create_display(self) -> display.NullDisplay:
        return display.FailuresDisplay(self.out)

    def write_end(self) -> None:
        for line in self.summary_lines():
            self.out.write(f"{line}\n")


class Json(Reporter):
    """`doit -r json`: one JSON object at the end, alone on standard output."""

    def create_display(self) -> display.NullDisplay:
        return display.NullDisplay()

    def initialize(self, tasks: Any, selected_tasks: Any) -> None:
        super().initialize(tasks, selected_tasks)
        standard_streams.keep_lines_whole()
        self.stdout_redirect = contextlib.redirect_stdout(sys.stderr)  # receives the output of tasks
        self.stdout_redirect.__enter__()

    def write_end(self) -> None:
        self.stdout_redirect.__exit__(None, None, None)
        models = run_results.model_rows(self.tasks, self.required, self.results)
        data = {**run_results.as_data(models, self.results), "aborted": self.aborted}
        self.out.write(json.dumps(data, indent=1) + "\n")
