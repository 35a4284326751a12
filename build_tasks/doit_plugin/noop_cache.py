"""The no-op cache: if an earlier run found a model up to date, later runs check it only if something below has changed.

    models/<model>/ and below ┐
    files its tasks read      ├─ stat of each ───┐
    files its tasks wrote     ┘                  ├─► all unchanged? the model is up to date
    doit's records of its tasks ─────────────────┤     otherwise its spec is read, and each task is checked
    the tools, this project, the GPU ────────────┘

To check a model, a run has to parse its spec, to create its fifteen or more tasks, and to compare the fingerprint of
each. That takes milliseconds, and seconds for a thousand models. The cache takes one stat for each file of the model.
It is the file build/.noop_cache. Losing it costs time, never correctness.

A change that happens during a run must not enter the cache unchecked. So everything in the cache was read before the
check of the model, or by the check itself:

- The stat of a file was recorded before its digest was compared.
- The list of the files in the model's folder was made before the spec was read.
- For a task, the cache holds the digest of the record that doit used to check it, not of a later record.

The next run thus notices every change that happens during a run.

This module reads the cache, and is small, because every `doit` imports it. noop_record.py writes it.
"""

import functools
import itertools
import marshal
import os
import sys
import zlib
from collections.abc import Collection, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

from build_tasks.doit_plugin.folder_listing import paths_below
from build_tasks.doit_plugin.stat_signatures import check_all, packed, stat_fields, stat_signatures
from build_tasks.paths import BUILD, MODELS, STATE_DB, has_spec

CACHE_FILE = f"{BUILD}/.noop_cache"
VERSION = b"3"  # version of the cache file's format
PROJECT = ("dodo.py", "build_tasks", "pyproject.toml", "doit.cfg")  # the last two files may hold options of doit
PRUNE = "prune"  # name of the task
WAL = 2  # SQLite's number of the journal mode "write-ahead log"


class Record(NamedTuple):
    """The cache's record of a model that is up to date.

    folder, folder_signatures: The files in the model's folder, and their signatures from `stat_signatures`.
    paths, stat_signatures: All other files that the model's tasks read or write, and their signatures.
    tasks: The names of the model's tasks and of their group. The group has the model's name.
    row_digests: The digests of doit's records of these tasks, from `state.row_digest`.
    machine: The facts about this machine, from `machine_signature`. None if the model does not depend on them.
    triton_models: The descriptions of the Triton models, by name.
    counts: The number of tasks in each state.
    messages: The messages about tasks that are not for this machine.
    rows: The values of the model's `run_results.ModelRow`s.
    """

    folder: list[str]
    folder_signatures: bytes
    paths: list[str]
    stat_signatures: bytes
    tasks: list[str]
    row_digests: list[bytes]
    machine: str | None
    triton_models: dict[str, str]
    counts: dict[str, int]
    messages: list[str]
    rows: list[tuple[Any, ...]]


class Contents(NamedTuple):
    """The whole cache.

    global_signature: The signature of the files that all models depend on; see `_global_signature`.
    state_signature: The `_state_signature` at a time when doit's records were those in `models`.
    models: The records of the models, by name.
    """

    global_signature: bytes
    state_signature: bytes
    models: dict[str, Record]


EMPTY = Contents(b"", b"", {})


class NoopCache:
    """The models that a run does not have to check.

    unchanged: The records of the requested models that have not changed, by name.
    unselected: The records of the models that were not requested and whose folders have not changed, by name.
    requested: The names of the models in `unchanged` that the command line names.
    only_models: Whether the command line names nothing but models.
    changed: A tuple for every other model, by name: the paths in its folder, their signatures, and the signature of its
        folder in build/.
    """

    def __init__(self) -> None:
        self.unchanged: dict[str, Record] = {}
        self.unselected: dict[str, Record] = {}
        self.requested: list[str] = []
        self.only_models = False
        self.changed: dict[str, tuple[list[str], bytes, bytes]] = {}
        self.contents = EMPTY
        self.global_signature = b""
        self.state_signature = b""
        self.state_verified = False  # whether all of doit's records were compared, and equal those in `contents`

    @property
    def complete(self) -> bool:
        """Whether the cache knows every model, and nothing has changed in any."""
        return self.only_models and not self.changed and bool(self.unchanged)

    @property
    def triton_models(self) -> dict[str, dict[str, str]]:
        """The Triton models of each model whose spec does not have to be read, with their descriptions."""
        return {name: record.triton_models for name, record in (*self.unselected.items(), *self.unchanged.items())}

    def load(self, requested: Collection[str]) -> None:
        """Compare the cache with the project. Call this before a spec is read.

        Args:
            requested: The names on the command line; empty for all models.
        """
        self.only_models = True
        self.contents, self.global_signature, self.state_signature = _read(), _global_signature(), _state_signature()
        known = self.contents.models if self.contents.global_signature == self.global_signature else {}
        names = model_names(known)
        selected = {name: known[name] for name in names if name in known and (not requested or name in requested)}
        same_files = check_all(_is_unchanged, [*selected.values()])
        self.unchanged = self._with_same_records(dict(itertools.compress(selected.items(), same_files)))
        self.requested = [name for name in self.unchanged if name in requested]
        self.unselected = {
            name: known[name]
            for name in names
            if name in known
            and name not in selected
            and stat_signatures(known[name].folder) == known[name].folder_signatures
        }
        for name in names:
            if name not in self.unchanged and name not in self.unselected:
                folder = paths_below(f"{MODELS}/{name}")
                self.changed[name] = folder, stat_signatures(folder), stat_signatures([f"{BUILD}/{name}"])

    def _with_same_records(self, models: dict[str, Record]) -> dict[str, Record]:
        """Return the models whose records in doit's database, and whose machine, equal those in the cache."""
        if any(record.machine is not None for record in models.values()):
            models = {name: r for name, r in models.items() if r.machine in (None, machine_signature())}
        if self.state_signature and self.state_signature == self.contents.state_signature:
            return models
        same = models_with_same_records(models)
        self.state_verified = same.keys() == self.contents.models.keys()
        return same

    def refresh(self) -> None:
        """Save the cache with the current state of doit's table, if all its records were compared."""
        if self.state_verified and self.state_signature == _state_signature():
            write(self.contents._replace(state_signature=self.state_signature))


class Request(NamedTuple):
    """A command line that names nothing but models: their names (empty for all), and whether it has `-r quiet`."""

    models: set[str]
    quiet: bool


def requested_models(words: Sequence[str]) -> Request | None:
    """Parse the words after `doit run`. Return None if they name anything but models."""
    remaining, models, quiet = list(words), set(), False
    while remaining:
        word = remaining.pop(0)
        if word == "-n" and remaining and remaining[0].isdecimal():
            del remaining[0]
        elif word == "-r" and remaining[:1] == ["quiet"]:
            del remaining[0]
            quiet = True
        elif "/" not in word and os.path.exists(f"{MODELS}/{word}/model.toml"):
            models.add(word)
        else:
            return None
    return Request(models, quiet)


def model_names(known: Collection[str] = ()) -> list[str]:
    """Return the names of all models, sorted. The caller checks whether the specs of `known` ones exist."""
    try:
        folders = os.listdir(MODELS)
    except OSError:  # dodo.py will report it
        return []
    return sorted(name for name in folders if name in known or has_spec(name))


def _is_unchanged(record: Record) -> bool:
    return (
        stat_signatures(record.folder) == record.folder_signatures
        and stat_signatures(record.paths) == record.stat_signatures
        and not (record.messages and os.environ.get("BUILD_CACHE"))  # the cache may have what this machine cannot build
    )


@functools.cache
def machine_signature() -> str:
    """Return the facts about this machine. They are looked up once for all models."""
    from build_tasks.runtime import hardware

    return hardware.signature()


def models_with_same_records(models: dict[str, Record]) -> dict[str, Record]:
    """Return the models whose records in doit's database equal those in the cache.

    If `doit ignore` has marked `prune`, none is returned, because every run has to report that.
    """
    import sqlite3

    from build_tasks.doit_plugin.state import is_recorded_as_ignored, read_row_digests
    from build_tasks.runtime import sqlite_files

    if not os.path.exists(STATE_DB) or sqlite_files.obstacle(STATE_DB):
        return {}
    try:
        with closing(sqlite3.connect(f"file:{STATE_DB}?mode=ro", uri=True, timeout=1)) as connection:
            if is_recorded_as_ignored(connection, PRUNE):
                return {}
            return {
                name: record
                for name, record in models.items()
                if read_row_digests(connection, record.tasks) == record.row_digests
            }
    except sqlite3.DatabaseError:
        return {}


def _global_signature() -> bytes:
    """Return a signature of the files that all models depend on: this project and the installed distributions."""
    project = os.getcwd()
    umask = os.environ.get("REPOSITORY_UMASK")  # of what is published; dodo.py checks its value
    libraries = [path for path in sys.path if path not in ("", project)]
    outside = os.environ.get("BUILD_DATA_FOLDERS")
    inherited = f"{sys.version}\n{libraries}\n{outside}\n{umask}\n"
    return inherited.encode() + stat_signatures([*libraries, *project_files()])


def project_files() -> list[str]:
    """Return the project's files, whether they exist or not. A file more or less shows in their number."""
    return [path for part in PROJECT for path in paths_below(part, with_folders=False)]


def _state_signature() -> bytes:
    """Return a signature of doit's table that changes with every record; empty if there is none.

    It is the stat of the file, with SQLite's transaction counter from its header. Two transactions within one tick of
    the clock differ in the counter. A copy that replaced the file differs in its inode or ctime. In the mode
    "write-ahead log", which a user can set, a transaction changes another file, so there is no signature.
    Source: sqlite.org, fileformat.html, "The Database Header".
    """
    if not os.path.isfile(STATE_DB):  # to open a FIFO would wait for ever
        return b""
    with suppress(OSError), open(STATE_DB, "rb") as table:
        header = table.read(28)
        if len(header) == 28 and WAL not in header[18:20]:
            return packed(stat_fields(os.fstat(table.fileno()))) + header[24:]
    return b""


def _read() -> Contents:
    """Return the cache; empty if there is none, or if it is damaged."""
    with suppress(OSError, ValueError, EOFError, TypeError):
        if not os.path.isfile(CACHE_FILE):  # to open a FIFO would wait for ever
            return EMPTY
        data = Path(CACHE_FILE).read_bytes()
        header, body = data[: len(HEADER)], memoryview(data)[len(HEADER) + 4 :]
        if header == HEADER and zlib.crc32(body).to_bytes(4) == data[len(HEADER) : len(HEADER) + 4]:
            global_signature, state_signature, models = marshal.loads(body)
            return Contents(global_signature, state_signature, {name: Record(*r) for name, r in models.items()})
    return EMPTY


# marshal writes the cache, because importing msgspec takes 20 ms. The format of marshal may change with each version of
# Python, like that of bytecode. So the header names the version.
HEADER = VERSION + sys.implementation.cache_tag.encode() + b"\n"


def write(contents: Contents) -> None:
    """Replace the cache, if that is possible."""
    from build_tasks.runtime import atomic_files

    models = {name: tuple(record) for name, record in contents.models.items()}
    body = marshal.dumps((contents.global_signature, contents.state_signature, models))
    with suppress(OSError), atomic_files.scratch_dir() as folder:
        draft = f"{folder}/noop_cache"
        Path(draft).write_bytes(HEADER + zlib.crc32(body).to_bytes(4) + body)
        atomic_files.replace(draft, CACHE_FILE)


noop_cache = NoopCache()
