"""The build cache of a team: results of stages by fingerprint, behind BUILD_CACHE. A build never depends on it.

    outdated stage ─► key ─► action? ─► blobs, verified while they stream into the scratch folder ─► targets
                               └─ none: the stage runs ─► targets ─► blobs, then the action, beside the next stages

A cache that is slow, absent or full is given up for the rest of the run, with one line. A blob that is not what its
action says is not used, with one line, and the stage runs.
"""

import contextlib
import functools
import getpass
import os
import platform
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec

from build_tasks.errors import UserError, with_suggestion
from build_tasks.json_files import read_json, write_json
from build_tasks.paths import BUILD
from build_tasks.runtime import cache_entries, worker
from build_tasks.runtime.cache_entries import Action, Blob, Output
from build_tasks.runtime.cache_storage import AbandonedError, DamagedError, Storage, StorageError
from build_tasks.runtime.digests import digest
from build_tasks.runtime.fingerprint import BuildRecord, changed_tools
from build_tasks.runtime.limits import DOWNLOAD_SIZE, limit
from build_tasks.runtime.progress import Progress

T = TypeVar("T")

URL, MODE = "BUILD_CACHE", "BUILD_CACHE_MODE"
READ, WRITE = "read", "write"
USAGE = f"{BUILD}/.cache_usage.json"  # what this checkout has got from the cache
AT_ONCE = 4  # files of one stage that are fetched at once; a bucket answers each after some ten milliseconds
RENEWED_AFTER = 86400.0  # seconds: an action that is used is written again, so that `doit cache prune` keeps it


def check_variables() -> None:
    """Raise UserError if the mode is no mode."""
    mode = os.environ.get(MODE) or WRITE
    if mode not in (READ, WRITE):
        raise UserError(f"{MODE}: expected {READ} or {WRITE}, found {with_suggestion(mode, (READ, WRITE))}")


@functools.cache
def of_run() -> "BuildCache":
    """The cache of this process."""
    return BuildCache(os.environ[URL], writes=os.environ.get(MODE) != READ)


class BuildCache:
    """A cache that the threads of one run share.

    Args:
        url: Any URL of fsspec.
        writes: Whether this run may add to it.

    Attributes:
        usage: Counts of this run: "fetched", "missed" and "stored" stages, bytes "read" and "written", "refused" blobs,
            and the "seconds" that the fetched stages took where they ran.
    """

    def __init__(self, url: str, writes: bool):
        self.usage = dict.fromkeys(("fetched", "missed", "stored", "read", "written", "refused", "seconds"), 0.0)
        self._url = url
        self._reads = True
        self._writes = writes
        self._damaged: set[str] = set()  # paths of blobs that are written again
        self._lock = threading.RLock()
        self._pending: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None

    @functools.cached_property
    def storage(self) -> Storage:
        with self._lock:
            return Storage(self._url)

    def find(self, key: str, tools: Mapping[str, str]) -> Action | None:
        """Return the result of a stage, None if the cache has none.

        If there is none with exactly these tools, the newest one counts in which they are the same, and which has more:
        a tool or a GPU that is absent here makes no result stale.

        Args:
            key: The fingerprint of the stage, without its tools.
            tools: The tools of the stage that this machine has.
        """
        return self._reading(lambda: self._find(key, tools))

    def fetch(self, key: str, action: Action, drafts: Mapping[str, str], task: str) -> bool:
        """Write the targets of a stage into the scratch folder; returns whether all of them are there and right.

        Args:
            drafts: Path of each target, by the name that the stage gives it.
            task: The task, for messages.
        """
        if action.outputs.keys() != drafts.keys() or action.size > limit(DOWNLOAD_SIZE) * 1e9:
            return False
        if not self._reading(lambda: self._fetch(action, drafts, task)):
            self._damaged.update(blob.path for blob in action.blobs)  # the others may be damaged, too
            return False
        self._count(fetched=1, read=sum(blob.stored_size for blob in action.blobs), seconds=action.seconds)
        if time.time() - action.time > RENEWED_AFTER:
            self._enqueue(self._renew, key, action)
        return True

    def store(self, task: str, key: str, paths: Mapping[str, str], record: BuildRecord, driver: str | None) -> None:
        """Add the result of a stage to the cache, in a thread beside the build.

        Args:
            paths: The targets, by the name that the stage gives them.
            record: The record of the build.
            driver: The version of the GPU's driver, if the result depends on a GPU.
        """
        self._count(missed=1)
        self._enqueue(self._store, task.partition(":")[0], key, dict(paths), record, driver)

    def finish(self, wait: bool = True) -> str:
        """Wait until everything is stored, and return a line about the run; "" if the cache was not used.

        Args:
            wait: Whether to wait. What is not stored yet is lost without harm.
        """
        if wait and self._writer:
            self._pending.put(None)
            self._writer.join()
            self._writer = None
        if not any(self.usage.values()):
            return ""
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            before = read_json(USAGE) if os.path.exists(USAGE) else {}
            write_json(USAGE, {name: before.get(name, 0) + count for name, count in self.usage.items()})
        read, written = (f"{self.usage[name] / 1e6:.1f} MB" for name in ("read", "written"))
        text = f"build cache: {self.usage['fetched']:.0f} fetched ({read}, for {self.usage['seconds']:.1f} s of work)"
        return text + (f", {self.usage['stored']:.0f} stored ({written})" if self.usage["stored"] else "")

    def _find(self, key: str, tools: Mapping[str, str]) -> Action | None:
        if action := self.read_action(cache_entries.path_of(key, tools)):
            return action
        found = map(self.read_action, self.storage.find(cache_entries.folder_of(key)))
        actions = [action for action in found if action and not changed_tools(action.tools, tools)]
        return max(actions, key=lambda action: action.time, default=None)

    def read_action(self, path: str) -> Action | None:
        """Return the action at a path; None if there is none, or if the file is no action."""
        try:
            return cache_entries.decode(self.storage.read(path, cache_entries.MAX_ACTION))
        except FileNotFoundError:
            return None

    def _fetch(self, action: Action, drafts: Mapping[str, str], task: str) -> bool:
        files = [
            (blob, f"{drafts[name]}/{inner}" if inner else drafts[name])
            for name, output in action.outputs.items()
            for inner, blob in output.files.items()
        ]
        done = 0
        with ThreadPoolExecutor(AT_ONCE) as pool:
            results = pool.map(lambda file: self._fetch_file(file[0], file[1], task), files)
            for (blob, _), right in zip(files, results, strict=True):
                if not right:
                    return False
                done += blob.size
                worker.listener(task, Progress("fetching", done, action.size, "B"))
        return all(digest(drafts[name], remember=False) == output.digest for name, output in action.outputs.items())

    def _fetch_file(self, blob: Blob, path: str, task: str) -> bool:
        """Write a blob to a path; returns whether it is there and right."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(path, "wb") as file:
                verifier = cache_entries.Verifier(blob, file.write)
                self.storage.stream(blob.path, blob.stored_size, verifier)
                verifier.finish()
        except DamagedError as error:
            self._count(refused=1)
            line = f"a file of {task} is damaged there and not used ({blob.path}: {error})"
            worker.listener(task, f"! build cache: {line}")
            return False
        except FileNotFoundError:  # pruned meanwhile
            return False
        digest.learn(path, blob.sha256)
        return True

    def _store(self, stage: str, key: str, paths: dict[str, str], record: BuildRecord, driver: str | None) -> None:
        outputs = {}
        for name, path in paths.items():
            expected = record["outputs"].get(path)
            if expected is None or digest(path) != expected:
                return  # another run has already replaced it
            files = {inner: self.store_file(file) for inner, file in cache_entries.files_of(path).items()}
            outputs[name] = Output(expected, files)
        machine = {"user": _user(), "host": platform.node(), **({"driver": driver} if driver else {})}
        action = Action(stage, outputs, record["tools"], record["notes"], record["seconds"], machine, time.time())
        self.storage.write(cache_entries.path_of(key, action.tools), [action.encode()])
        self._count(stored=1)

    def store_file(self, path: str) -> Blob:
        """Store the content of a file, unless it is there.

        Raises:
            AbandonedError: If the file changes meanwhile.
        """
        sha256, size = digest(path), os.path.getsize(path)
        content = cache_entries.compressed(path)
        if sha256 is None or digest(path) != sha256:
            raise AbandonedError
        name = sha256 if content is None else f"{sha256}.gz"
        blob = Blob(sha256, size, name, size if content is None else len(content))
        if blob.path in self._damaged or self.storage.size(blob.path) != blob.stored_size:
            self.storage.write(blob.path, cache_entries.chunks_of(path, sha256) if content is None else [content])
            self._damaged.discard(blob.path)
            self._count(written=blob.stored_size)
        return blob

    def _renew(self, key: str, action: Action) -> None:
        renewed = msgspec.structs.replace(action, time=time.time())
        self.storage.write(cache_entries.path_of(key, action.tools), [renewed.encode()])

    def _reading(self, access: Callable[[], T]) -> T | None:
        """Call a function that reads. After the first failure, which is reported, nothing is read or written any more.

        Returns: None after a failure.
        """
        if not self._reads:
            return None
        try:
            return access()
        except (StorageError, OSError) as error:
            self._give_up(str(error), reading=True)
            return None

    def _enqueue(self, *call: Any) -> None:
        if not self._writes:
            return
        with self._lock:
            self._pending.put(call)
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, daemon=True, name="build cache writer")
                self._writer.start()

    def _write(self) -> None:
        while (call := self._pending.get()) is not None:
            function, *arguments = call
            if self._writes:
                try:
                    function(*arguments)
                except AbandonedError:
                    pass
                except (StorageError, OSError) as error:
                    self._give_up(str(error), reading=False)

    def _give_up(self, reason: str, reading: bool) -> None:
        """After a failure nothing more is written, and after one of reading nothing more is read."""
        with self._lock:
            if self._reads if reading else self._writes:
                ending = "this run goes on without it" if reading else "this run stores nothing more"
                worker.listener("", f"! build cache: {reason}; {ending}")
            self._reads, self._writes = self._reads and not reading, False

    def _count(self, **counts: float) -> None:
        with self._lock:
            for name, count in counts.items():
                self.usage[name] += count


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may have a user without a name
        return str(os.getuid())
