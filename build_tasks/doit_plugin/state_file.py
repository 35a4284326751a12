"""The SQLite file of doit's records: its lock is waited for, and a damaged file is replaced.

    access ─► locked?  ─► wait, and say for whom ─► locked for long? ─► StateError
        └───► damaged? ─► moved aside ─► a new file with the records that can still be read ─► access

A record holds the digests of all that a task has read and written. So a record that survived the damage, or that is
older than the files in build/, is compared with these files, as every record is.
"""

import os
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from doit.exceptions import InvalidTask

from build_tasks.errors import listed, message_line
from build_tasks.runtime import atomic_files, resources, sqlite_files

T = TypeVar("T")
Rows = dict[str, bytes]  # doit's record of each task, as JSON

NEW_TABLE = "create table if not exists doit (task_id text not null primary key, task_data json)"  # as doit has it
COLUMNS = [("task_id", 1), ("task_data", 0)]  # with their places in the primary key
WAL = 2  # SQLite's number of the journal mode "write-ahead log"
ATTEMPT = 0.1  # seconds that SQLite itself waits for a lock; Ctrl-C works only between two attempts
NOTICE_AFTER, LOCK_LIMIT = 1, 30  # seconds


class StateError(InvalidTask):  # type: ignore[misc]  # doit has no types
    """doit's records cannot be read or written. doit shows the message in one line."""

    def __init__(self, message: str):
        super().__init__(message_line(message))


def notify(line: str) -> None:
    """Show a line. Standard output belongs to the command: `doit -r json` writes JSON to it."""
    sys.stderr.write(f"{message_line(line)}\n")
    sys.stderr.flush()


class StateFile:
    """The file, opened when it is first used."""

    def __init__(self, path: str):
        self.path = path
        self.connection: sqlite3.Connection | None = None
        self.identity: tuple[int, int] | None = None  # of the file that `connection` has opened
        self.stays_locked: StateError | None = None  # that is not waited for a second time

    def run(self, action: Callable[[sqlite3.Connection], T], wait: bool = True) -> T:
        """Return what `action` returns, which is called again when a lock has ended or the file was replaced.

        Args:
            wait: Whether to wait for a lock.
        Raises:
            StateError: If the file stays locked, or cannot be used and not be replaced.
        """
        try:
            return self._attempt(action, wait)
        except sqlite3.DatabaseError as error:
            self._mend(error)
        try:
            return self._attempt(action, wait)
        except sqlite3.DatabaseError as error:
            raise self._error(error) from error

    def close(self) -> None:
        if self.connection:
            self.connection.close()
            self.connection = None

    def _attempt(self, action: Callable[[sqlite3.Connection], T], wait: bool) -> T:
        def attempt() -> T:
            if self.connection is None:
                self.identity = _identity(self.path)
                self.connection = _open(self.path)
                self.identity = self.identity or _identity(self.path)
            return action(self.connection)

        patience = LOCK_LIMIT if wait and not self.stays_locked else 0
        try:
            return wait_for_lock(self.path, attempt, patience)
        except StateError as error:
            if self.stays_locked:
                raise self.stays_locked from None
            if wait:
                self.stays_locked = error
            raise

    def _mend(self, error: sqlite3.DatabaseError) -> None:
        """Make another attempt possible.

        Raises:
            StateError: If that is not possible.
        """
        self.close()
        if isinstance(error, sqlite3.ProgrammingError):  # a mistake in this project
            raise error
        if self.identity != _identity(self.path):
            return  # another run has replaced the file, or somebody has removed it
        reason, folder = sqlite_files.unusable_reason(self.path, error), os.path.dirname(self.path) or "."
        read_only = sqlite_files.error_code(error) & 0xFF == sqlite3.SQLITE_READONLY
        if read_only and not os.access(self.path, os.W_OK) and os.access(folder, os.W_OK):
            reason = "cannot be written"
        if reason:
            try:
                with atomic_files.locked(folder):  # two runs may find the damage at the same time
                    if self.identity == _identity(self.path):
                        _replace(self.path, reason)
            except OSError as second:
                raise StateError(
                    f"{self.path} {reason}, and cannot be replaced ({second.strerror or second}): remove it, or make "
                    f"{folder}/ writable"
                ) from second
        elif os.access(folder, os.W_OK) or (rows := _rows_of_copy(self.path)) is None:
            raise self._error(error) from error
        else:  # a journal cannot be applied in a folder that is read-only
            self.connection = _memory(rows)

    def _error(self, error: sqlite3.DatabaseError) -> StateError:
        folder = os.path.dirname(self.path) or "."
        if message := resources.full_disk(folder):
            return StateError(f"{self.path}: {message}")
        if sqlite_files.error_code(error) & 0xFF in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            return StateError(f"{self.path} cannot be written: make it and {folder}/ writable ({error})")
        return StateError(f"{self.path}: {error}")


def read(path: str) -> Rows:
    """Return all records. Nothing is written, and no file is created.

    Raises:
        StateError: If the file stays locked, or cannot be read.
    """
    if not os.path.lexists(path):
        return {}
    try:
        return wait_for_lock(path, lambda: _read_only_rows(path))
    except sqlite3.DatabaseError as error:
        if reason := sqlite_files.unusable_reason(path, error):
            rows = _readable_rows(path)
            notify(f"{path} {reason}. `doit` moves it to {sqlite_files.path_aside(path)}; {_remaining(rows)}")
            return rows
        if (rows_of_copy := _rows_of_copy(path)) is None:
            raise StateError(f"{path}: {error}") from error
        return rows_of_copy


def wait_for_lock(path: str, action: Callable[[], T], patience: float = LOCK_LIMIT) -> T:
    """Return what `action` returns. While the file is locked, call it again.

    Args:
        patience: Seconds to wait at most.
    Raises:
        StateError: If the file stays locked.
    """
    started, noticed = time.monotonic(), False
    while True:
        try:
            return action()
        except sqlite3.OperationalError as error:
            if not sqlite_files.is_busy(error):
                raise
            waited = time.monotonic() - started
            if waited >= patience:
                raise StateError(
                    f"{path} is locked by {sqlite_files.lock_holder(path)}, also after {patience:.0f} s: wait until "
                    "that has ended, or end it, and run doit again"
                ) from error
            if waited >= NOTICE_AFTER and not noticed:
                noticed = True
                notify(f"{path} is locked by {sqlite_files.lock_holder(path)}: waiting, for {patience:.0f} s at most")
            time.sleep(ATTEMPT / 10)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _open(path: str) -> sqlite3.Connection:
    """Open the file, and make the table if there is none."""
    if reason := sqlite_files.obstacle(path):
        raise sqlite3.DatabaseError(reason)
    connection = sqlite3.connect(path, timeout=ATTEMPT)
    try:
        if not _has_table(connection):
            connection.execute(NEW_TABLE)
    except BaseException:
        connection.close()
        raise
    return connection


def _has_table(connection: sqlite3.Connection) -> bool:
    """Return whether the file has doit's table; False if it is empty.

    Raises:
        sqlite3.DatabaseError: If it has others.
    """
    tables = [name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")]
    columns = [(row[1], row[5]) for row in connection.execute("pragma table_info(doit)")]
    if tables and columns != COLUMNS:
        raise sqlite3.DatabaseError(f"expected doit's table of records, found other tables: {listed(tables)}")
    return bool(tables)


def _replace(path: str, reason: str) -> None:
    """Move a damaged file aside, and put a new one with its readable records in its place."""
    rows = _readable_rows(path)
    with atomic_files.scratch_dir() as folder:
        draft = f"{folder}/{os.path.basename(path)}"
        with closing(_open(draft)) as connection:
            _insert(connection, rows)
        aside = sqlite_files.set_aside(path)
        atomic_files.replace(draft, path)
    notify(f"{path} {reason}. It is now {aside}; {_remaining(rows)}")


def _remaining(rows: Rows) -> str:
    return f"its {len(rows)} readable records are kept" if rows else "no record of a build is left"


def _insert(connection: sqlite3.Connection, rows: Rows) -> None:
    with connection:
        connection.executemany("insert or replace into doit values (?, ?)", _decoded(rows))


def _decoded(rows: Rows) -> Iterator[tuple[str, str]]:
    return ((task, data.decode(errors="replace")) for task, data in rows.items())


def _memory(rows: Rows) -> sqlite3.Connection:
    """Return a table in memory that cannot be written."""
    connection = _open(":memory:")
    _insert(connection, rows)
    connection.execute("pragma query_only = on")
    return connection


def _read_only_rows(path: str) -> Rows:
    if reason := sqlite_files.obstacle(path):
        raise sqlite3.DatabaseError(reason)
    with open(path, "rb") as file:
        header = file.read(20)
    if WAL in header[18:20] and (rows := _rows_of_copy(path)) is not None:  # SQLite would write beside it to read it
        return rows
    with closing(sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True, timeout=ATTEMPT)) as connection:
        return _rows(connection) if _has_table(connection) else {}


def _rows_of_copy(path: str) -> Rows | None:
    """Return the records in a copy of the file and its journal, which SQLite can apply there. None if that fails.

    Another process may write meanwhile. Then the copy is made again.
    """
    files = [path, *(f"{path}{suffix}" for suffix in ("-journal", "-wal"))]
    with suppress(OSError, sqlite3.Error), tempfile.TemporaryDirectory() as folder:
        for _ in range(10):
            before = _stats(files)
            for file in files:
                target = Path(folder, os.path.basename(file))
                target.unlink(missing_ok=True)
                if os.path.exists(file):
                    shutil.copyfile(file, target)
            if _stats(files) == before:
                break
        with closing(_open(f"{folder}/{os.path.basename(path)}")) as connection:
            return _rows(connection)
    return None


def _stats(files: list[str]) -> list[tuple[int, ...]]:
    stats = [os.stat(file) for file in files if os.path.exists(file)]
    return [(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns) for status in stats]


def _readable_rows(path: str) -> Rows:
    """Return the records of a damaged file that can be read. Its journal is not used.

    SQLite stops at the first damaged page. So the table is read from both ends.
    """
    rows: Rows = {}
    if not os.path.isfile(path):
        return rows
    for order in ("asc", "desc"):
        with (
            suppress(sqlite3.Error, OSError),
            closing(sqlite3.connect(f"file:{quote(path)}?mode=ro&immutable=1", uri=True)) as connection,
        ):
            _rows(connection, order, rows)
    return rows


def _rows(connection: sqlite3.Connection, order: str = "asc", rows: Rows | None = None) -> Rows:
    """Add all records to `rows`, and return it."""
    rows = {} if rows is None else rows
    connection.text_factory = lambda text: text.decode(errors="replace")
    for task, data in connection.execute(f"select task_id, cast(task_data as blob) from doit order by rowid {order}"):
        if isinstance(task, str) and isinstance(data, bytes):
            rows.setdefault(task, data)
    return rows
