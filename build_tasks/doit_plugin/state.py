"""doit's records of the tasks that succeeded, in build/.doit.sqlite3.

    doit's runner ─► StateManager ─► StateDB ─► state_file.py ─► SQLite
                          └─► RunObserver: the reporter of the run

All use of doit's private attributes is in this module. It fits one minor release of doit, and `require_doit` refuses
all others.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import sqlite3
import sys
from typing import Any, Protocol, TypedDict

import doit.version
import msgspec
from doit.dependency import Dependency, DependencyStatus, JSONCodec, SqliteDB
from doit.exceptions import InvalidDodoFile

from build_tasks.doit_plugin import state_file
from build_tasks.doit_plugin.state_file import Rows, StateError, StateFile
from build_tasks.paths import STATE_DB
from build_tasks.runtime.digests import ContentChecker
from build_tasks.runtime.fingerprint import BuildRecord

DOIT = (0, 37)  # the minor release whose private attributes are used here
DISTRIBUTION = "triton-model-repository-build"
COMMANDS = (0, 2)  # its oldest release with the command `run`


def require_doit() -> None:
    """Check the version of doit.

    Raises:
        InvalidDodoFile: If it is not 0.37. doit prints the message in one line and exits with 3.
    """
    if (found := tuple(doit.version.VERSION))[:2] != DOIT:
        expected, installed = ".".join(map(str, DOIT)), ".".join(map(str, found))
        raise InvalidDodoFile(
            f"this project requires doit {expected}, and doit {installed} is installed: "
            "run `pip install -r requirements.txt`"
        )


def require_installed_commands() -> None:
    """Check that doit_model_repository.py, which adds this project's commands to doit, fits this checkout.

    Raises:
        InvalidDodoFile: If it is missing or too old.
    """
    # doit has imported it already for all commands but its own. To look its version up takes some milliseconds.
    if getattr(sys.modules.get("doit_model_repository"), "VERSION", ()) >= COMMANDS:
        return
    try:
        found = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found == "none" or tuple(map(int, found.split(".")[:2])) < COMMANDS:
        expected = ".".join(map(str, COMMANDS))
        raise InvalidDodoFile(
            f"this project requires {DISTRIBUTION} {expected} or newer, which adds its commands to doit, and finds "
            f"{found}: run `pip install -r requirements.txt`"
        )


class StateDB(SqliteDB):  # type: ignore[misc]  # doit has no types
    """doit's table of records, for all commands; see state_file.py for the file.

    It is opened when it is first used, because doit creates this object before dodo.py creates build/. All changes are
    kept in memory and written by `save`, in one transaction. So no other run waits for a lock of this one.
    """

    def __init__(self, name: str, codec: JSONCodec, *, module_name: str | None = None):
        self.name = name
        self.codec = codec
        self.row_digests: dict[str, bytes] = {}  # the digest of each task's row when it was read
        self.file = StateFile(name)
        self._cache: dict[str, dict[str, Any]] = {}
        self._dirty: set[str] = set()
        self._removed: set[str] = set()
        self._all_removed = False

    def connect(self) -> None:
        """Open the file.

        Raises:
            StateError: If that is not possible.
        """
        self.file.run(lambda connection: None)

    def in_(self, task_id: str) -> bool:
        return bool(self._cache[task_id]) if task_id in self._cache else self._record(task_id) is not None

    def remove(self, task_id: str) -> None:
        self._cache[task_id] = {}
        self._dirty.discard(task_id)
        self._removed.add(task_id)

    def remove_all(self) -> None:
        self._cache.clear()
        self._dirty.clear()
        self._removed.clear()
        self._all_removed = True

    def save(self, wait: bool = True) -> None:
        """Write all changes to the file, and keep it open.

        Args:
            wait: Whether to wait if another process has locked the file.
        Raises:
            StateError: If the disk is full, for example. The changes are kept for the next call.
        """
        if not (self._dirty or self._removed or self._all_removed):
            return
        rows = [(task_id, self.codec.encode(self._cache[task_id])) for task_id in self._dirty]

        def write(connection: sqlite3.Connection) -> None:
            with connection:  # commits, or rolls back
                connection.execute("begin immediate")
                if self._all_removed:
                    connection.execute("delete from doit")
                connection.executemany("delete from doit where task_id = ?", [(task_id,) for task_id in self._removed])
                connection.executemany("insert or replace into doit values (?, ?)", rows)

        self.file.run(write, wait)
        self._dirty.clear()
        self._removed.clear()
        self._all_removed = False

    def dump(self) -> None:
        """Write all changes to the file, and close it. doit calls this at the end of a command."""
        self.save()
        self.file.close()

    def _get_task_data(self, task_id: str) -> dict[str, Any]:
        data = self._record(task_id)
        self.row_digests[task_id] = row_digest(data)
        return decode(data)

    def _record(self, task_id: str) -> bytes | None:
        """Return the row of a task in the file."""
        if self._all_removed:
            return None
        row: tuple[str, bytes] | None = self.file.run(lambda c: c.execute(f"{SELECT} = ?", (task_id,)).fetchone())
        return row and row[1]


class ReadOnlyStateDB(StateDB):
    """doit's table, of which nothing is written."""

    @functools.cached_property
    def _rows(self) -> Rows:
        return state_file.read(self.name)

    def _record(self, task_id: str) -> bytes | None:
        return self._rows.get(task_id)

    def save(self, wait: bool = True) -> None:
        """Do nothing."""


class RunObserver(Protocol):
    """The methods of a reporter that `StateManager` calls when doit's runner uses the records."""

    def before_stale_task(self, task: Any) -> None:
        """Called when doit has found that a task is not up to date."""

    def skip_unsupported(self, task: Any) -> bool:
        """Return whether the run leaves a task out because this machine cannot build it."""

    def state_not_saved(self, error: StateError) -> None:
        """Called when the records could not be written at the end of a run."""


class StateManager(Dependency):  # type: ignore[misc]  # doit has no types
    """doit's dependency manager. During a run it also calls the run's observer."""

    def __init__(self, database: type[StateDB] = StateDB, name: str = STATE_DB):
        super().__init__(database, name, checker_cls=ContentChecker)
        self.observer: RunObserver | None = None
        self.compared: set[str] = set()  # the names of the tasks whose files were compared with their records

    def get_status(self, task: Any, tasks_dict: dict[str, Any], get_log: bool = False) -> DependencyStatus:
        self.compared.add(task.name)
        status = super().get_status(task, tasks_dict, get_log)
        if self.observer and status.status == "run":
            self.observer.before_stale_task(task)
        return status

    def remove_success(self, task: Any) -> None:
        """Remove the record of a task that has failed.

        doit also calls this for the tasks that it skips behind one. Their files are as they were, so their records
        stay. Otherwise a mistake that is undone, such as a file that was moved away, would build everything again.
        """
        if task.name in self.compared:
            super().remove_success(task)

    def status_is_ignore(self, task: Any) -> bool:
        return is_ignored(self, task) or (self.observer is not None and self.observer.skip_unsupported(task))

    def save(self) -> None:
        """Write all changes to the file now, if that is possible at once. `close` reports what could not be written."""
        with contextlib.suppress(StateError):
            self.backend.save(wait=False)

    def close(self) -> None:
        try:
            super().close()
        except StateError as error:
            if self.observer is None:
                raise
            self.observer.state_not_saved(error)


def is_ignored(records: Dependency, task: Any) -> bool:
    """Return whether `doit ignore` has marked a task."""
    return bool(Dependency.status_is_ignore(records, task))


# The fields of doit's record whose types matter. The others are the digests of files, by path.
TaskRecord = TypedDict("TaskRecord", {"_values_:": BuildRecord, "deps:": list[str], "checker:": str}, total=False)
SELECT = "select task_id, cast(task_data as blob) as data from doit where task_id"
NO_ROW = b"-"


def row_digest(data: bytes | None) -> bytes:
    """Return the digest of doit's record of one task.

    Args:
        data: The content of the row; None if there is no row.
    """
    return NO_ROW if data is None else hashlib.sha256(data).digest()


def decode(data: bytes | None) -> dict[str, Any]:
    """Return doit's record of one task; an empty one if there is no row, or if its content is no such record."""
    data = data or b"{}"
    try:
        try:
            record: dict[str, Any] = msgspec.json.decode(data)  # twice as fast as json
        except msgspec.DecodeError:  # NaN, or half of a surrogate pair, which only Python's json writes and reads
            record = json.loads(data)
        msgspec.convert(record, TaskRecord)
    except (ValueError, RecursionError):  # also msgspec.ValidationError
        return {}
    return record


def is_recorded_as_ignored(connection: sqlite3.Connection, task: str) -> bool:
    """Return whether `doit ignore` has marked a task, from doit's table."""
    row = connection.execute(f"{SELECT} = ?", (task,)).fetchone()
    return row is not None and "ignore:" in decode(row[1])


def read_row_digests(connection: sqlite3.Connection, tasks: list[str]) -> list[bytes]:
    """Return the digest of each task's row."""
    rows = dict(connection.execute(f"{SELECT} in ({', '.join('?' * len(tasks))})", tasks).fetchall())
    return [row_digest(rows.get(task)) for task in tasks]
