"""doit's records of the tasks that succeeded, in build/.doit.sqlite3.

    doit's runner ─► StateManager ─► StateDB ─► SQLite
                          └─► RunObserver: the reporter of the run

All use of doit's private attributes is in this module. It fits one minor release of doit, and `require_doit` refuses
all others.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import sqlite3
import sys
from typing import Any, Protocol

import doit.version
from doit.dependency import Dependency, DependencyStatus, JSONCodec, SqliteDB
from doit.exceptions import InvalidDodoFile

from build_tasks.paths import STATE_DB
from build_tasks.runtime.digests import ContentChecker

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
    """doit's table of records.

    It connects when it is first used, because doit creates it before dodo.py creates build/. It can be saved at any
    time. doit would save its table only at the end of a run.
    """

    def __init__(self, name: str, codec: JSONCodec, *, module_name: str | None = None):
        self.name = name
        self.codec = codec
        self.row_digests: dict[str, bytes] = {}  # the digest of each task's row when it was read
        self._cache: dict[str, dict[str, Any]] = {}
        self._dirty: set[str] = set()

    @functools.cached_property
    def _conn(self) -> sqlite3.Connection:
        connection: sqlite3.Connection = self._sqlite3(self.name)
        return connection

    def connect(self) -> None:
        """Open the file.

        Raises:
            DatabaseException: If it is no database.
        """
        _ = self._conn

    def save(self) -> None:
        """Write all changes to the file, and keep it open.

        Raises:
            sqlite3.OperationalError: If the disk is full, for example. The changes are kept for the next call.
        """
        for task_id in self._dirty:
            row = task_id, self.codec.encode(self._cache[task_id])
            self._conn.execute("insert or replace into doit values (?, ?)", row)
        self._conn.commit()
        self._dirty.clear()

    def _get_task_data(self, task_id: str) -> dict[str, Any]:
        row = self._conn.execute(f"{SELECT} = ?", (task_id,)).fetchone()
        self.row_digests[task_id] = row_digest(row and row["data"])
        data: dict[str, Any] = self.codec.decode(row["data"].decode()) if row else {}
        return data


class ReadOnlyStateDB(StateDB):
    """A copy of doit's table in memory: nothing is written, and no file is created."""

    def _sqlite3(self, name: str) -> sqlite3.Connection:
        memory: sqlite3.Connection = super()._sqlite3(":memory:")
        if os.path.exists(name):
            with contextlib.closing(sqlite3.connect(f"file:{name}?mode=ro", uri=True)) as source:
                source.backup(memory)
        return memory


class RunObserver(Protocol):
    """The methods of a reporter that `StateManager` calls when doit's runner uses the records."""

    def before_stale_task(self, task: Any) -> None:
        """Called when doit has found that a task is not up to date."""

    def skip_unsupported(self, task: Any) -> bool:
        """Return whether the run leaves a task out because this machine cannot build it."""

    def state_not_saved(self, error: sqlite3.OperationalError) -> None:
        """Called when the records could not be written at the end of a run."""


class StateManager(Dependency):  # type: ignore[misc]  # doit has no types
    """doit's dependency manager. During a run it also calls the run's observer."""

    def __init__(self, database: type[StateDB] = StateDB, name: str = STATE_DB):
        super().__init__(database, name, checker_cls=ContentChecker)
        self.observer: RunObserver | None = None

    def get_status(self, task: Any, tasks_dict: dict[str, Any], get_log: bool = False) -> DependencyStatus:
        status = super().get_status(task, tasks_dict, get_log)
        if self.observer and status.status == "run":
            self.observer.before_stale_task(task)
        return status

    def status_is_ignore(self, task: Any) -> bool:
        return is_ignored(self, task) or (self.observer is not None and self.observer.skip_unsupported(task))

    def remove_success(self, task: Any) -> None:
        """Remove the record of a task that failed. If the disk is full, the old record stays, but it does not
        match the task any more."""
        with contextlib.suppress(sqlite3.OperationalError):
            super().remove_success(task)

    def save(self) -> None:
        """Write all changes to the file now, if that is possible. `close` reports records that could not be written."""
        with contextlib.suppress(sqlite3.OperationalError):
            self.backend.save()

    def close(self) -> None:
        try:
            super().close()
        except sqlite3.OperationalError as error:
            if self.observer is None:
                raise
            self.observer.state_not_saved(error)


def is_ignored(records: Dependency, task: Any) -> bool:
    """Return whether `doit ignore` has marked a task."""
    return bool(Dependency.status_is_ignore(records, task))


SELECT = "select task_id, cast(task_data as blob) as data from doit where task_id"
NO_ROW = b"-"


def row_digest(data: bytes | None) -> bytes:
    """Return the digest of doit's record of one task.

    Args:
        data: The content of the row; None if there is no row.
    """
    return NO_ROW if data is None else hashlib.sha256(data).digest()


def is_recorded_as_ignored(connection: sqlite3.Connection, task: str) -> bool:
    """Return whether `doit ignore` has marked a task, from doit's table."""
    row = connection.execute(f"{SELECT} = ?", (task,)).fetchone()
    return row is not None and "ignore:" in json.loads(row[1])


def read_row_digests(connection: sqlite3.Connection, tasks: list[str]) -> list[bytes]:
    """Return the digest of each task's row."""
    rows = dict(connection.execute(f"{SELECT} in ({', '.join('?' * len(tasks))})", tasks).fetchall())
    return [row_digest(rows.get(task)) for task in tasks]
