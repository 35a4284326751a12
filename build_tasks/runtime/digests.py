"""The sha256 of files and folders, computed once per content and cached by the file's identity.

    stat ─► identity: device, inode, size, mtime, ctime ─► in the cache? ─► its digest
                                                           │ else: the file is read

The cache is a small table, `build/.digests.sqlite3`: path -> identity, digest. The identity holds inode and ctime
besides size and mtime, because an edit can restore the mtime, but not the ctime. To lose the table costs time, never
correctness.

A file that this process renames, links or copies keeps its cached digest, so that it is read once.
"""

import contextlib
import hashlib
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from urllib.parse import quote

from doit.dependency import FileChangedChecker

from build_tasks.paths import BUILD
from build_tasks.runtime import sqlite_files

TABLE = f"{BUILD}/.digests.sqlite3"

# Timestamps advance with the kernel's clock tick, 10 ms at most on Linux. A file that changed within this window could
# change again with the same ctime. The digest of such a small file is not cached. Reading a large file again would take
# longer than the window, so for a large file the process waits until the window is over.
RACY_WINDOW_NS = 20_000_000
WORTH_A_PAUSE = 1 << 20  # bytes; files above this are large
LOCK_LIMIT = 5.0  # seconds to wait for another process that has locked the cache; then this run works without it


class Digests:
    """Digests of files and folders by path. Threads may share it.

    Args:
        table: Path of the SQLite file that keeps the cache.

    Attributes:
        remembers: Whether new digests are cached on disk; `doit plan` writes nothing.
    """

    def __init__(self, table: str = TABLE):
        self.remembers = True
        self._table = table
        self._cached: dict[str, tuple[str, str]] | None = None  # path -> identity, digest
        self._listed: dict[str, str] = {}  # path of a folder -> its identity when its listing was read
        self._digests: dict[str, str] | None = None  # identity -> digest, under any path
        self._unsaved: dict[str, tuple[str, str]] = {}
        self._patience = LOCK_LIMIT
        self._lock = threading.Lock()

    def __call__(self, path: str, remember: bool = True, status: os.stat_result | None = None) -> str | None:
        """The sha256 of a file's content, in hex; for a folder, of the names and contents in it.

        None if the path does not exist. Raises OSError for what is neither a file nor a folder.

        Args:
            remember: Whether to cache the digest under this path. A draft's path does not stay.
            status: What os.stat has just returned for this path, if it was called.
        """
        try:
            status = status or os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if stat.S_ISDIR(status.st_mode):
            if time.time_ns() - status.st_ctime_ns > RACY_WINDOW_NS:
                self._listed[path] = _identity(status)
            return self._folder(path, remember)
        if not stat.S_ISREG(status.st_mode):  # to open a FIFO waits, and a device has no end
            raise OSError(f"{path} is a FIFO, a socket or a device, not a file")
        identity = _identity(status)
        cached = self._load().get(path)
        if cached and cached[0] == identity:
            return cached[1]
        if digest := self._by_identity().get(identity):
            if remember and self.remembers:
                self._remember(path, identity, digest)
            return digest
        return self._read(path, remember)

    def identity(self, path: str) -> tuple[int, ...] | None:
        """The (device, inode, size, mtime, ctime) of the file or folder at a path when it was read; times in ns.

        A file was read when its digest was computed, a folder when its listing was read in this run. None if it was
        not read, or if it was within the racy window at that time.
        """
        identity = self._listed.get(path) or self._load().get(path, ("",))[0]
        try:
            return tuple(map(int, identity.split(":")))
        except ValueError:  # "", or the content of a damaged cache
            return None

    @contextlib.contextmanager
    def preserve_digest(self, path: str) -> Iterator[None]:
        """Context manager for a rename, link or chmod: the file keeps its cached digest although its ctime changes.

        If somebody writes into the file meanwhile, its mtime differs afterwards, and it is read again.
        """
        try:
            # Windows renames no open file. To open a FIFO without O_NONBLOCK would wait for ever.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if os.name == "posix" else None
        except OSError:  # it does not exist, or is not readable
            descriptor = None
        if descriptor is None:
            yield
            return
        try:
            before = os.fstat(descriptor)
            digest, paths = self._cached_digest(path, before)
            yield
            after = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        written = (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)
        if digest and after.st_nlink and not written:
            self._by_identity()[_identity(after)] = digest
            for name in paths:
                self._remember(name, _identity(after), digest)

    @contextlib.contextmanager
    def copy_digest(self, source: str, target: str) -> Iterator[None]:
        """Context manager for a copy by the system: `target` takes over the cached digest of `source`.

        It does not if `source` changes meanwhile.
        """
        before = os.stat(source)
        digest, _ = self._cached_digest(source, before)
        yield
        if digest and before.st_size > WORTH_A_PAUSE and _identity(os.stat(source)) == _identity(before):
            time.sleep(RACY_WINDOW_NS / 1e9)
            self._by_identity()[_identity(os.stat(target))] = digest

    def keep(self, path: str) -> None:
        """Cache the digests of a new target under its path, or of all files in it, where those of the draft are known.

        The digest of a small draft is not known if it was read within the racy window. To read the target would be in
        vain: its ctime is that of the rename, so that it is within the window again.
        """
        with contextlib.suppress(OSError):  # another run has replaced it meanwhile
            if os.path.isdir(path):
                for name in os.listdir(path):
                    self.keep(f"{path}/{name}")
            elif self.remembers and (digest := self._by_identity().get(identity := _identity(os.stat(path)))):
                self._remember(path, identity, digest)

    def learn(self, path: str, digest: str) -> None:
        """Take over the digest of a file that this process has just written, hashing the bytes on the way."""
        if os.path.getsize(path) > WORTH_A_PAUSE:
            time.sleep(RACY_WINDOW_NS / 1e9)
            self._by_identity()[_identity(os.stat(path))] = digest

    def forget(self, paths: list[str]) -> None:
        """Drop the cached digests of these files, under all their names: their content is not what they tell."""
        identities = {_identity(os.stat(path)) for path in paths if os.path.exists(path)}
        names = [name for name, (identity, _) in self._load().items() if name in paths or identity in identities]
        rows = [(name,) for name in names]
        self._access(lambda table: table.executemany("delete from digests where path = ?", rows).close())
        with self._lock:
            self._cached = self._digests = None

    def _cached_digest(self, path: str, status: os.stat_result) -> tuple[str | None, list[str]]:
        """The cached digest of a file, and all paths that it is cached under; a file with several links has several."""
        cached, identity = self._load(), _identity(status)
        if status.st_nlink > 1:
            names = [name for name, (known, _) in list(cached.items()) if known == identity]
        else:
            names = [path] if cached.get(path, ("",))[0] == identity else []
        return self._by_identity().get(identity), names

    def _by_identity(self) -> dict[str, str]:
        if self._digests is None:  # a run that finds every file under its path needs no such table
            self._digests = dict(list(self._load().values()))
        return self._digests

    def _folder(self, path: str, remember: bool) -> str:
        # Bytecode too: Python runs it in place of a source file.
        return folder_digest((name, self(os.path.join(path, name), remember)) for name in os.listdir(path))

    def _read(self, path: str, remember: bool) -> str:
        with open(path, "rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            racy = time.time_ns() - before.st_ctime_ns < RACY_WINDOW_NS
            if racy and before.st_size > WORTH_A_PAUSE:
                time.sleep(RACY_WINDOW_NS / 1e9)
                before = os.fstat(file.fileno())
                racy = time.time_ns() - before.st_ctime_ns < RACY_WINDOW_NS
            if before.st_size > WORTH_A_PAUSE:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            else:  # file_digest would first fill a buffer of 256 KiB with zeros
                digest = hashlib.sha256(file.read()).hexdigest()
            after = os.fstat(file.fileno())
        if not racy and _identity(before) == _identity(after):
            self._by_identity()[_identity(after)] = digest
            if remember and self.remembers:
                self._remember(path, _identity(after), digest)
        return digest

    def _connect(self) -> sqlite3.Connection:
        if reason := sqlite_files.obstacle(self._table):
            raise sqlite3.DatabaseError(reason)
        if not self.remembers:
            return sqlite3.connect(f"file:{quote(self._table)}?mode=ro", uri=True, timeout=self._patience)
        os.makedirs(os.path.dirname(self._table), exist_ok=True)
        connection = sqlite3.connect(self._table, timeout=self._patience, isolation_level=None)
        try:
            connection.execute("pragma synchronous = off")
            connection.execute("create table if not exists digests (path text primary key, identity text, digest text)")
        except BaseException:
            connection.close()
            raise
        return connection

    def _access(self, action: Callable[[sqlite3.Connection], None]) -> None:
        """Call `action` with the table, if that is possible. A damaged table is removed, and a new one begins."""
        for _ in range(2):
            try:
                with contextlib.closing(self._connect()) as table:
                    return action(table)
            except sqlite3.DatabaseError as error:
                if sqlite_files.is_busy(error):
                    self._patience = 0  # wait for such a lock once
                if not self.remembers or sqlite_files.unusable_reason(self._table, error) is None:
                    return None
                with contextlib.suppress(OSError):
                    sqlite_files.discard(self._table)
            except OSError:
                return None
        return None

    def _load(self) -> dict[str, tuple[str, str]]:
        with self._lock:
            if self._cached is None:
                self._cached = {}
                if self.remembers or os.path.exists(self._table):
                    self._access(self._read_table)
            return self._cached

    def _read_table(self, table: sqlite3.Connection) -> None:
        rows = table.execute(
            "select path, identity, digest from digests where typeof(identity) = 'text' and length(digest) = 64"
        )
        self._cached = {path: (identity, digest) for path, identity, digest in rows}

    def _remember(self, path: str, identity: str, digest: str) -> None:
        cached = self._load()
        with self._lock:
            cached[path] = self._unsaved[path] = identity, digest

    def save(self) -> None:
        """Write the new digests into the table, in one transaction: one for each file would cost noticeable time."""
        with self._lock:
            if self._unsaved:
                self._access(self._write_table)

    def _write_table(self, table: sqlite3.Connection) -> None:
        table.execute("begin immediate")
        for path, cached in self._unsaved.items():
            with contextlib.suppress(UnicodeEncodeError):  # a file name that is not UTF-8
                table.execute("insert or replace into digests values (?, ?, ?)", (path, *cached))
        table.execute("commit")
        self._unsaved.clear()


def folder_digest(entries: Iterable[tuple[str, str | None]]) -> str:
    """The sha256 of a folder, in hex: of the names and digests of its entries.

    A name that is not UTF-8 counts with the bytes that it has on the disk.
    """
    listing = hashlib.sha256()
    for name, value in sorted(entries):
        listing.update(f"{name}\0{value}\0".encode(errors="surrogateescape"))
    return listing.hexdigest()


def _identity(status: os.stat_result) -> str:
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


digest = Digests()


class ContentChecker(FileChangedChecker):  # type: ignore[misc]  # doit has no types
    """doit's file dependencies by content: after a target was rebuilt with the same bytes, nothing else is rebuilt."""

    def check_modified(self, file_path: str, file_stat: os.stat_result, state: str) -> bool:
        try:
            return digest(file_path, status=file_stat) != state
        except OSError:  # the stage itself will fail with the reason
            return True

    def get_state(self, dep: str, current_state: str | None) -> str | None:
        state = digest(dep)
        return None if state == current_state else state  # doit: None means unchanged
