"""The files of a build cache, behind any URL of fsspec. No access waits longer than its bytes explain.

    BUILD_CACHE ─► fsspec: file://, s3://, gs://, az://, … ─► read, stream, write, find, remove
                                                 └─► too slow, absent, refused ─► StorageError, one line

A file appears complete or not at all. An object store does that by itself; in a folder, a rename moves the complete
file to its path.
"""

import contextlib
import datetime
import os
import posixpath
import queue
import re
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from build_tasks.errors import first_lines, printable

T = TypeVar("T")
Advance = Callable[[int], None]

PATIENCE = 5.0  # seconds that an access may take beyond the time for its bytes
SLOWEST = 1e6  # bytes per second: a slower cache is given up
PROMPT = 1.0  # seconds: an access that waits for longer, beyond the time for its bytes, counts as slow
MAX_WAITED = 10.0  # seconds that slow accesses may wait together; each prompt one takes PROMPT off that sum
CHUNK = 512 << 10  # bytes that are read and written at once; with less, the second thread of a sha256 costs more
SMALL = 4 << 20  # bytes of a file that is fetched with a single request
BLOCK = 16 << 20  # bytes of one part of an upload to an object store
# In these, an object that was closed appears whole, and a rename is a copy.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "memory"}
DRAFTS = "drafts"  # the folder of incomplete files where there is a rename
MODIFIED = ("mtime", "LastModified", "last_modified", "updated", "created")  # names of a time in fsspec's listings


class StorageError(Exception):
    """The cache cannot be used. The text is the reason, in one line."""


class EntryError(Exception):
    """Raised by what takes or gives the bytes of a file. It is no failure of the storage."""


class AbandonedError(EntryError):
    """A file is not to be written after all."""


class DamagedError(EntryError):
    """A blob is not what its action says."""


class Entry(NamedTuple):
    """A file of the cache.

    size: In bytes.
    modified: Seconds since 1970; None if the storage does not tell.
    """

    size: int
    modified: float | None


class Storage:
    """Files of a cache by their path below its URL.

    Raises:
        StorageError: If no library for the URL is installed, or if the URL is wrong.
    """

    def __init__(self, url: str):
        if re.match(r"[A-Za-z][\w+.-]+:(?!//|:)", url):  # fsspec would take it for the name of a folder
            raise StorageError(f"expected a URL, s3://bucket/prefix for example, found {printable(url)!r}")
        try:
            from fsspec.core import url_to_fs

            # A listing that is kept would hide what other machines write.
            self._files, root = url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            # The libraries for gs:// and az:// are not in that file; fsspec's message names them.
            hint = " (pip install -r requirements-cache.txt)" if re.search("fsspec|s3fs", str(error)) else ""
            raise StorageError(f"{first_lines(error)}{hint}") from error
        except Exception as error:  # the libraries have no common base class
            raise StorageError(first_lines(error)) from error
        self.url = printable(url)
        self._waited = 0.0  # seconds of slow accesses; threads may lose an addition, which does no harm
        self._root = root.rstrip("/")
        protocols = self._files.protocol
        names = [protocols] if isinstance(protocols, str) else protocols
        self.renames = OBJECT_STORES.isdisjoint(names)
        self._local = "file" in names
        # The URL as it can be used in any folder: the path of a local cache may be relative to this project.
        self.full_url = f"file://{self._root}" if self._local and "::" not in url else url

    def read(self, path: str, limit: int) -> bytes:
        """Return the content of a small file.

        Args:
            limit: Bytes; no more than one byte beyond it is read.
        Raises:
            FileNotFoundError: If it does not exist.
        """

        def access(advance: Advance) -> bytes:
            content: bytes = self._files.cat_file(self._path(path), start=0, end=limit + 1)
            advance(len(content))
            return content

        return self._bounded(access)

    def stream(self, path: str, size: int, sink: Callable[[bytes], object]) -> None:
        """Pass the content of a file to `sink`, in chunks; at most one byte more than `size`.

        Raises:
            FileNotFoundError: If it does not exist.
        """

        def access(advance: Advance) -> None:
            left = size + 1
            with self._files.open(self._path(path), "rb", block_size=BLOCK, cache_type="readahead") as file:
                while left and (chunk := file.read(min(CHUNK, left))):
                    advance(len(chunk))
                    sink(chunk)
                    left -= len(chunk)

        if size > SMALL:
            self._bounded(access)
        else:  # one request instead of two
            sink(self.read(path, size))

    def write(self, path: str, chunks: Iterable[bytes]) -> None:
        """Write a file from chunks. If they raise an exception, the file does not appear, or is removed again."""

        def access(advance: Advance) -> None:
            target = self._path(path)
            draft = self._path(self.draft(path)) if self.renames else target
            if self.renames:
                for folder in (posixpath.dirname(target), posixpath.dirname(draft)):
                    self._make_folder(folder)
            try:
                with self._files.open(draft, "wb", block_size=BLOCK) as file:
                    for chunk in chunks:
                        file.write(chunk)
                        advance(len(chunk))
            except BaseException:
                with contextlib.suppress(Exception):
                    self._files.rm_file(draft)
                raise
            if self._local:
                os.chmod(draft, self._permissions() & 0o666)
            if self.renames:
                self._files.mv(draft, target)

        self._bounded(access)

    def size(self, path: str) -> int | None:
        """Return the bytes of a file, None if it does not exist."""

        def access(advance: Advance) -> int | None:
            try:
                return int(self._files.info(self._path(path))["size"])
            except FileNotFoundError:
                return None

        return self._bounded(access)

    def find(self, folder: str, patience: float = PATIENCE) -> dict[str, Entry]:
        """Return all files below a folder, by path.

        Args:
            patience: Seconds that it may take. That depends on the number of files, which nobody knows before.
        """

        def access(advance: Advance) -> dict[str, Entry]:
            try:
                found = self._files.find(self._path(folder), detail=True)
            except FileNotFoundError:
                return {}
            top = self._path("")
            return {
                name.removeprefix(top): Entry(int(info["size"] or 0), _modified(info)) for name, info in found.items()
            }

        return self._bounded(access, patience)

    def remove(self, paths: Iterable[str]) -> None:
        """Remove files. One that does not exist any more is no error: another machine may prune, too."""
        for path in paths:

            def access(advance: Advance, path: str = path) -> None:
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(self._path(path))

            self._bounded(access)

    def draft(self, path: str) -> str:
        """Return the path of an incomplete file, where a rename moves it to `path` later."""
        return f"{DRAFTS}/{uuid.uuid4().hex}"

    def _make_folder(self, folder: str) -> None:
        """Make a folder of the cache. In a local one it gets the permissions of the cache's own folder."""
        missing = []
        while self._local and folder not in (self._root, "") and not os.path.isdir(folder):
            missing.append(folder)
            folder = posixpath.dirname(folder)
        self._files.makedirs(missing[0] if missing else folder, exist_ok=True)
        for path in missing:
            with contextlib.suppress(OSError):  # another user has just made it
                os.chmod(path, self._permissions())

    def _permissions(self) -> int:
        """Return those of the folder of the cache: they say who shares it, and not the umask of who writes a file."""
        return stat.S_IMODE(os.stat(self._root).st_mode)

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _bounded(self, access: Callable[[Advance], T], patience: float = PATIENCE) -> T:
        """Call `access` in a thread, and give it up if it is too slow. The thread then ends with its next chunk.

        Libraries have time limits of their own, which are minutes long and repeated.
        """
        results: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
        moved, given_up = [0], threading.Event()

        def advance(count: int) -> None:
            if given_up.is_set():
                raise TimeoutError
            moved[0] += count

        def work() -> None:
            try:
                results.put((access(advance), None))
            except BaseException as error:
                results.put((None, error))

        threading.Thread(target=work, daemon=True, name="build cache").start()
        begin = time.monotonic()
        while (left := begin + patience + moved[0] / SLOWEST - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                value, error = results.get(timeout=left)
                if isinstance(error, FileNotFoundError | EntryError):
                    raise error
                if isinstance(error, NotImplementedError):
                    raise StorageError(f"{self.url} can only be read; BUILD_CACHE_MODE=read says so") from error
                if error is not None:
                    raise StorageError(f"{self.url}: {first_lines(error)}") from error
                if patience == PATIENCE:
                    self._check_waits(time.monotonic() - begin - moved[0] / SLOWEST)
                return value  # type: ignore[return-value]
        given_up.set()
        slow = f"slower than {SLOWEST / 1e6:g} MB/s" if moved[0] else f"no answer within {patience:g} s"
        raise StorageError(f"{self.url}: {slow}")

    def _check_waits(self, waited: float) -> None:
        """Raise StorageError if answers come, and nearly all of them late: the seconds would add up with the stages."""
        self._waited = max(0.0, self._waited + (waited if waited > PROMPT else -PROMPT))
        if self._waited > MAX_WAITED:
            raise StorageError(f"{self.url}: its last answers took {self._waited:.0f} s")


def _modified(info: dict[str, Any]) -> float | None:
    value = next((info[key] for key in MODIFIED if info.get(key) is not None), None)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = datetime.datetime.fromisoformat(value)
    if isinstance(value, datetime.datetime):
        return value.timestamp()
    return float(value) if isinstance(value, int | float) else None
