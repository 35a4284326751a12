"""SQLite files of this project: what damage to one looks like, who holds its lock, and how it is moved aside."""

import os
import sqlite3
import stat
import struct
from contextlib import suppress

try:
    import fcntl
except ImportError:  # Windows has no fcntl
    fcntl = None  # type: ignore[assignment]

SIDE_FILES = ("-journal", "-wal", "-shm")  # what SQLite puts beside a file, at the end of its name
ENVIRONMENT_ERRORS = {  # SQLite's codes of errors that say nothing about the file
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_IOERR,
}
READ_ERRORS = {sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_CORRUPTFS}  # extended codes of SQLITE_IOERR

# The bytes of a file that SQLite locks: the first two for a writer, the others for readers. Source: os.h of SQLite.
WRITER_BYTES = (0x40000000, 2)
ALL_LOCK_BYTES = (0x40000000, 512)
FLOCK = "hhqqi"  # struct flock of Linux: type, whence, start, length, process
MAX_COMMAND = 100  # characters


def obstacle(path: str) -> str | None:
    """Return why SQLite cannot open the file at a path; None if it can, or if there is nothing at the path.

    Call this before the file is opened: to open a FIFO waits for ever.
    """
    try:
        if reason := _kind(os.stat(path).st_mode):
            return f"is {reason}"
    except FileNotFoundError:
        if os.path.islink(path) and not os.path.isdir(os.path.dirname(os.path.realpath(path))):
            return f"is a link to {os.readlink(path)}, which does not exist"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    for suffix in SIDE_FILES:
        with suppress(OSError):
            if reason := _kind(os.lstat(f"{path}{suffix}").st_mode):
                return f"cannot be used, because {os.path.basename(path)}{suffix} is {reason}"
    return None


def _kind(mode: int) -> str | None:
    if stat.S_ISREG(mode):
        return None
    return "a folder" if stat.S_ISDIR(mode) else "a link" if stat.S_ISLNK(mode) else "a FIFO, a socket or a device"


def unusable_reason(path: str, error: sqlite3.DatabaseError) -> str | None:
    """Return what is wrong with a file, from the error of an access to it.

    None if the file may be intact: if it is locked, for example, or if the disk is full.
    """
    if reason := obstacle(path):
        return reason
    code = error_code(error)
    if code & 0xFF == sqlite3.SQLITE_CANTOPEN and os.path.lexists(path) and not os.access(path, os.R_OK):
        return "cannot be read (Permission denied)"
    if code & 0xFF in ENVIRONMENT_ERRORS and code not in READ_ERRORS:
        return None
    return f"cannot be used ({error})"


def error_code(error: sqlite3.Error) -> int:
    """Return SQLite's extended code of an error. Errors that Python raises have none, and count as SQLITE_ERROR."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)


def is_busy(error: sqlite3.Error) -> bool:
    """Return whether the file is locked by another process."""
    return error_code(error) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def path_aside(path: str) -> str:
    """Return the free path that `set_aside` would move a file to."""
    number, aside = 1, f"{path}.damaged"
    while os.path.lexists(aside):
        number += 1
        aside = f"{path}.damaged-{number}"
    return aside


def set_aside(path: str) -> str:
    """Rename a file, with the files that SQLite put beside it, and return its new path.

    SQLite would apply a journal that remains to the next file of this name. It does not if that file is empty, so a
    kill between the renames does no harm.

    Raises:
        OSError: If it cannot be renamed.
    """
    aside = path_aside(path)
    os.rename(path, aside)
    for suffix in SIDE_FILES:
        if os.path.lexists(f"{path}{suffix}"):
            os.rename(f"{path}{suffix}", f"{aside}{suffix}")
    return aside


def discard(path: str) -> None:
    """Remove a file whose content can be computed again, with the files that SQLite put beside it.

    A folder in the place of one is moved aside: it is none of this project's.

    Raises:
        OSError: If that is not possible.
    """
    for file in (path, *(f"{path}{suffix}" for suffix in SIDE_FILES)):
        if os.path.isdir(file) and not os.path.islink(file):
            set_aside(file)
        elif os.path.lexists(file):
            os.remove(file)


def lock_holder(path: str) -> str:
    """Return the process that has locked a file: "process 123 (doit forget) on the host buildbox", as far as known.

    Call this only while this process has no lock on the file: the kernel would end that lock.

    Source: man 2 fcntl, F_GETLK.
    """
    pid = _lock_holder_pid(path)
    if pid > 0:
        command = _command(pid)
        return f"process {pid}{f' ({command})' if command else ''} on the host {os.uname().nodename}"
    return "a process of another machine or container" if pid < 0 else "another process"


def _lock_holder_pid(path: str) -> int:
    """Return the process; 0 if nobody holds the lock any more, -1 if the kernel does not know the process."""
    if fcntl is None:
        return 0
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            for start, length in (WRITER_BYTES, ALL_LOCK_BYTES):
                request = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
                kind, _, _, _, pid = struct.unpack(FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, request))
                if kind != fcntl.F_UNLCK:
                    return pid if pid > 0 else -1
        finally:
            os.close(descriptor)
    return 0


def _command(pid: int) -> str:
    import shlex

    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().rstrip(b"\0").split(b"\0")
    except OSError:
        return ""
    command = shlex.join(word.decode(errors="replace") for word in words)
    return command if len(command) <= MAX_COMMAND else f"{command[: MAX_COMMAND - 2]} …"
