"""What doit says while it runs, and three duties that only a reporter can do.

A reporter hears of every success right after doit has noted it: here it is written to disk at once, so that a kill
loses nothing. It hears what was asked for before anything runs: here what this machine cannot build, and nobody named,
is passed over as if `doit ignore` had been told. And it has the last word of a run: here the exit code becomes what the
design promises (a task that could not run because another failed is no crash).
"""

import signal
import sys
import threading
from types import FrameType
from typing import Any, TextIO

from doit.exceptions import BaseFail, TaskFailed, UnmetDependency
from doit.globals import Globals

from build_tasks.stage import NEVER_BUILT, Stage, not_here

WIDEST = 160  # characters of a reason; `doit info` tells all
GROUPS_BY_NAME = ("engine", "rtx")  # to ask for one of these groups is to ask for every engine in it


class Reporter:
    """doit's reporter protocol; see doit/reporter.py, ConsoleReporter."""

    desc = "a line when a stage starts and one when it ends"

    def __init__(self, outstream: TextIO, options: dict[str, Any]):
        self.out = outstream
        self.built = 0
        self.current = 0
        self.failed: list[tuple[str, BaseFail]] = []
        self.blocked: list[str] = []
        self.named: set[str] = set()
        self.elsewhere: set[str] = set()
        self.passed_over = 0
        self.aborted: list[str] = []
        self._lock = threading.Lock()

    def write(self, line: str) -> None:
        with self._lock:
            self.out.write(f"{line}\n")
            self.out.flush()

    def initialize(self, tasks: Any, selected_tasks: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.interrupted)
        self.named = needed(tasks, [name for name in selected_tasks if tasks[name].actions or name in GROUPS_BY_NAME])
        self.told_to_ignore = Globals.dep_manager.status_is_ignore
        Globals.dep_manager.status_is_ignore = lambda task: self.told_to_ignore(task) or self.pass_over(task)

    def pass_over(self, task: Any) -> bool:
        """Whether this machine cannot build what the task stands for, and nobody asked for it by name."""
        stage: Stage | None = (task.meta or {}).get("stage")
        if stage is None or task.name in self.named or not (lacks := stage.lacking()):
            return False
        values = Globals.dep_manager.get_values(task.name)
        reasons = [reason for check, _, _ in task.uptodate if not check(task, values) for reason in check.reasons]
        if not reasons:
            return False
        outdated = "" if reasons == [NEVER_BUILT] else f"outdated ({reasons[0]}), and "
        self.elsewhere.add(task.name)
        self.passed_over += 1
        self.write(f"– {_title(task)} {outdated}{not_here(lacks)}")
        return True

    def interrupted(self, number: int, frame: FrameType | None) -> None:
        """An orderly end: stages in flight are discarded, what is finished stays finished."""
        signal.signal(number, signal.SIG_DFL)
        self.aborted.append(f"interrupted by {signal.Signals(number).name}; what was finished is kept")
        raise SystemExit(128 + number)

    def get_status(self, task: Any) -> None:
        pass

    def execute_task(self, task: Any) -> None:
        if task.actions:
            self.write(f"  {_title(task)} ... {_cause(task)}".rstrip())

    def add_success(self, task: Any) -> None:
        if task.actions:
            remember(Globals.dep_manager)
            self.built += 1
            seconds = task.values.get("seconds")
            said = dict(task.values.get("notes", {}))
            table = said.pop("table", None)
            notes = ", ".join(f"{key}: {_told(value)}" for key, value in said.items())
            line = f"✓ {_title(task)} {'' if seconds is None else f'{seconds:6.1f} s'}  {notes}".rstrip()
            self.write(f"{line}\n{table}" if table else line)

    def add_failure(self, task: Any, fail: BaseFail) -> None:
        if isinstance(fail, UnmetDependency):
            self.blocked += [task.name] if task.actions else []  # a group is its tasks
            return
        self.failed.append((task.name, fail))
        self.write(f"✗ {_title(task)} {_reason(fail)}")

    def skip_uptodate(self, task: Any) -> None:
        self.current += bool(task.actions)

    def skip_ignore(self, task: Any) -> None:
        if task.name in self.elsewhere or not self.elsewhere.isdisjoint(task.task_dep):
            self.elsewhere.add(task.name)  # said already, or it needs what was
            return
        told = self.told_to_ignore(task)
        self.write(f"! {_title(task)} ignored, {'as `doit ignore` was told' if told else 'since it needs what is'}")

    def cleanup_error(self, exception: BaseFail) -> None:
        sys.stderr.write(exception.get_msg())

    def runtime_error(self, msg: str) -> None:
        self.aborted.append(msg)

    def teardown_task(self, task: Any) -> None:
        pass

    def complete_run(self) -> None:
        counts = {
            "built": self.built,
            "up to date": self.current,
            "not for this machine": self.passed_over,
            "failed": len(self.failed),
        }
        self.write(", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing to do")
        if self.blocked:
            self.write(f"not tried, for want of what failed: {', '.join(self.blocked)}")
        for message in self.aborted:
            self.write(message)
        if self.failed and not self.aborted:
            raise SystemExit(1 if all(isinstance(fail, TaskFailed) for _, fail in self.failed) else 2)


def needed(tasks: dict[str, Any], names: list[str]) -> set[str]:
    """These tasks, and all that they need."""
    found: set[str] = set()
    while names:
        name = names.pop()
        if name not in found:
            found.add(name)
            names += tasks[name].task_dep
    return found


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


def _title(task: Any) -> str:
    stage, _, name = task.name.partition(":")
    return f"{stage:<12} {name:<28}"


def _cause(task: Any) -> str:
    """Why a task runs that has run before: the first reason of its stage's fingerprint."""
    reasons = [reason for check, _, _ in task.uptodate for reason in getattr(check, "reasons", [])]
    if reasons == [NEVER_BUILT]:
        return ""
    if not reasons:
        return ""
    first = reasons[0] if len(reasons[0]) <= WIDEST else f"{reasons[0][:WIDEST]} …"
    return first + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "")


def _told(value: object) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def _reason(fail: BaseFail) -> str:
    return str(fail.get_msg()).strip()
