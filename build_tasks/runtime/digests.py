"""What a file's content is: sha256, computed once per content and remembered by the file's identity.

The memory is a small table, `build/.digests.sqlite3`: path -> identity, digest. The identity holds ctime and
inode besides size and mtime, since an edit can put the mtime back, but not the ctime. Losing the table costs
time, never correctness.

A file that this process renames, links or copies keeps what is known of it: it is read once.
"""

import contextlib
import hashlib
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator

from doit.dependency import FileChangedChecker

from build_tasks.paths import BUILD

TABLE = f"{BUILD}/.digests.sqlite3"

# Timestamps advance with the kernel's clock tick, 10 ms at most on Linux. A file that is younger than this could
# still change without its ctime showing it: its digest is not remembered, or, where that would cost more, waited for.
RACY_WINDOW_NS = 20_000_000
WORTH_A_PAUSE = 1 << 20  # bytes


class Digests:
    """Digest of a file or a folder by path; safe to call from several threads."""

    def __init__(self, table: str = TABLE):
        self.remembers = True  # on disk; `doit plan` writes nothing
        self._table = table
        self._known: dict[str, tuple[str, str]] | None = None
        self._listed: dict[str, str] = {}  # folders, as they were when their listing was read
        self._found: dict[str, str] | None = None  # identity -> digest, whatever the path
        self._unsaved: dict[str, tuple[str, str]] = {}
        self._lock = threading.Lock()

    def __call__(self, path: str, remember: bool = True, status: os.stat_result | None = None) -> str | None:
        """sha256 of the content, in hex; of names and contents for a folder. None where nothing is there.

        remember: for a path that will stay; a draft's will not.
        status: what stat has just said of it.
        """
        try:
            status = status or os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if stat.S_ISDIR(status.st_mode):
            if time.time_ns() - status.st_ctime_ns > RACY_WINDOW_NS:
                self._listed[path] = _identity(status)
            return self._folder(path, remember)
        identity = _identity(status)
        known = self._load().get(path)
        if known and known[0] == identity:
            return known[1]
        if digest := self._by_identity().get(identity):
            if remember and self.remembers:
                self._remember(path, identity, digest)
            return digest
        return self._read(path, remember)

    def identity(self, path: str) -> tuple[int, ...] | None:
        """What was found at a path, as stat told it: device, inode, size, mtime and ctime in ns.

        Of a file, when its digest was computed; of a folder, when its listing was read in this run. None where neither
        was, or where it was too young to tell whether it changed since.
        """
        known = self._listed.get(path) or self._load().get(path, ("",))[0]
        return tuple(map(int, known.split(":"))) if known else None

    @contextlib.contextmanager
    def preserve_digest(self, path: str) -> Iterator[None]:
        """Around what gives a file another ctime and the same content: a name or a mode more, less or other.

        Whoever wrote into it meanwhile has given it another mtime, too: then it is read anew.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY) if os.name == "posix" else None  # Windows renames no open file
        except OSError:  # nothing, or unreadable
            descriptor = None
        if descriptor is None:
            yield
            return
        try:
            before = os.fstat(descriptor)
            digest, paths = self._known_of(path, before)
            yield
            after = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        written = (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)
        if digest and after.st_nlink and not written:
            self._by_identity()[_identity(after)] = digest
            for each in paths:
                self._remember(each, _identity(after), digest)

    @contextlib.contextmanager
    def copy_digest(self, source: str, target: str) -> Iterator[None]:
        """Around a copy that the system makes: while `source` stays what it is, `target` has the same content."""
        before = os.stat(source)
        digest, _ = self._known_of(source, before)
        yield
        if digest and before.st_size > WORTH_A_PAUSE and _identity(os.stat(source)) == _identity(before):
            time.sleep(RACY_WINDOW_NS / 1e9)
            self._by_identity()[_identity(os.stat(target))] = digest

    def _known_of(self, path: str, status: os.stat_result) -> tuple[str | None, list[str]]:
        """The digest of a file, and the paths under which it is remembered: of several links there are others."""
        known, identity = self._load(), _identity(status)
        names = list(known) if status.st_nlink > 1 else [path]
        return self._by_identity().get(identity), [name for name in names if known.get(name, ("",))[0] == identity]

    def _by_identity(self) -> dict[str, str]:
        if self._found is None:  # where all is known by its path, nobody asks
            self._found = dict(list(self._load().values()))
        return self._found

    def _folder(self, path: str, remember: bool) -> str:
        listing = hashlib.sha256()
        for name in sorted({*os.listdir(path)} - {"__pycache__"}):  # which Triton's Python backend leaves behind
            listing.update(f"{name}\0{self(os.path.join(path, name), remember)}\0".encode())
        return listing.hexdigest()

    def _read(self, path: str, remember: bool) -> str:
        with open(path, "rb") as file:
            before = os.fstat(file.fileno())
            young = time.time_ns() - before.st_ctime_ns < RACY_WINDOW_NS
            if young and before.st_size > WORTH_A_PAUSE:
                time.sleep(RACY_WINDOW_NS / 1e9)
                before = os.fstat(file.fileno())
                young = time.time_ns() - before.st_ctime_ns < RACY_WINDOW_NS
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(file.fileno())
        if not young and _identity(before) == _identity(after):
            self._by_identity()[_identity(after)] = digest
            if remember and self.remembers:
                self._remember(path, _identity(after), digest)
        return digest

    def _connect(self) -> sqlite3.Connection:
        os.makedirs(os.path.dirname(self._table), exist_ok=True)
        connection = sqlite3.connect(self._table, timeout=30, isolation_level=None)
        connection.execute("pragma synchronous = off")
        connection.execute("create table if not exists digests (path text primary key, identity text, digest text)")
        return connection

    def _load(self) -> dict[str, tuple[str, str]]:
        with self._lock:
            if self._known is None and not self.remembers and not os.path.exists(self._table):
                self._known = {}
            if self._known is None:
                try:
                    with contextlib.closing(self._connect()) as table:
                        rows = table.execute("select path, identity, digest from digests")
                        self._known = {path: (identity, digest) for path, identity, digest in rows}
                except (sqlite3.DatabaseError, OSError) as error:
                    self._known = {}
                    if not isinstance(error, sqlite3.OperationalError | OSError):  # neither locked nor read-only:
                        with contextlib.suppress(OSError):  # damaged by a crash of the machine; begin a new one
                            os.remove(self._table)
            return self._known

    def _remember(self, path: str, identity: str, digest: str) -> None:
        known = self._load()
        with self._lock:
            known[path] = self._unsaved[path] = identity, digest

    def save(self) -> None:
        """Write what is new into the table: all at once, since a transaction for each file would show."""
        with self._lock, contextlib.suppress(sqlite3.DatabaseError, OSError):
            rows = [(path, *known) for path, known in self._unsaved.items()]
            self._unsaved.clear()
            if not rows:
                return
            with contextlib.closing(self._connect()) as table:
                table.execute("begin")
                for row in rows:
                    with contextlib.suppress(UnicodeEncodeError):  # a name of another age
                        table.execute("insert or replace into digests values (?, ?, ?)", row)
                table.execute("commit")


def _identity(status: os.stat_result) -> str:
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


digest = Digests()


class ContentChecker(FileChangedChecker):  # type: ignore[misc]  # doit has no types
    """doit's file dependencies by content, so that a rebuilt but identical file cuts the rebuild off."""

    def check_modified(self, file_path: str, file_stat: os.stat_result, state: str) -> bool:
        try:
            return digest(file_path, status=file_stat) != state
        except OSError:  # the stage will say what it is
            return True

    def get_state(self, dep: str, current_state: str | None) -> str | None:
        state = digest(dep)
        return None if state == current_state else state  # doit: None means unchanged
