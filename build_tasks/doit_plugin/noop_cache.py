"""A model that a run found up to date as a whole is not judged again before something of it has changed.

    models/<model>/ and below ┐
    what its tasks read       ├─ as stat saw it ─┐
    what its tasks made       ┘                  ├─► unchanged? what that run said of the model holds
    doit's rows on its tasks ────────────────────┤             else its spec is read, and each task judged
    the tools, this project, the GPU ────────────┘

To judge a model is to parse its spec, to make its fifteen or more tasks, and to ask each for its reasons: milliseconds,
and with a thousand models seconds. This takes a stat for each of its files. The memory is `build/.settled`; to lose it
costs time, never correctness.

What is remembered is never newer than what was judged: of a file the identity whose digest was compared, of the
model's folder and doit's rows what stood there before the spec was read. So whatever changes in between shows as a
difference the next time. In use where nothing but models is asked for; all other words of doit see all tasks.
"""

import array
import itertools
import os
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import msgspec

from build_tasks.doit_plugin import run_results, task_graph
from build_tasks.doit_plugin.reserved_names import COMMANDS, RESERVED
from build_tasks.doit_plugin.task_state import NOTHING_TO_DO, TaskState
from build_tasks.paths import BUILD, MODELS, STATE_DB
from build_tasks.runtime import atomic_files, hardware, resources
from build_tasks.runtime.digests import digest
from build_tasks.runtime.stage import nothing_missing, stage_of

TABLE = f"{BUILD}/.settled"
ABSENT = (0, 0, 0, 0, 0)
PROJECT = ("dodo.py", "build_tasks", "pyproject.toml", "doit.cfg")  # the last two: where doit's options may stand

NOTHING_RUNS = {*COMMANDS} - {"run"}  # all of doit's words but this build no tasks, and judge none for us

WORTH_A_CHILD = 100  # models whose files are looked at: a child takes some 3 ms, a model 0.2

StatSignature = tuple[int, ...]


class Record(msgspec.Struct, array_like=True):
    """What is known of a model that is up to date.

    folder: the paths in the model's folder; paths: all others. stamps: what stat says of them, as `stamps` gives it.
    rows: by task, the row of doit's table that tells what was built.
    gpu: of this machine, where the model asks for it.
    serves: Triton's models, and what each is.
    counts: of the tasks, by how they ended. said: the lines on those that are not for this machine.
    models: the rows of the table at the end of a run.
    """

    folder: list[str]
    folder_signatures: bytes
    paths: list[str]
    stat_signatures: bytes
    rows: dict[str, int | None]
    gpu: str | None
    serves: dict[str, str]
    counts: dict[TaskState, int]
    said: list[str]
    models: list[run_results.ModelRow]


class Known(msgspec.Struct):
    """The whole memory.

    world: what all models depend on, as `_world` tells it.
    recorded: what `_recorded` said of doit's table when the rows of all these models were in it.
    """

    world: bytes
    recorded: bytes
    models: dict[str, Record]


class NoopCache:
    """The models that need no judgement in this run, by name; and the memory of them."""

    def __init__(self) -> None:
        self.models: dict[str, Record] = {}
        self.named: list[str] = []  # those of them that were asked for by name
        self.apart: dict[str, Record] = {}  # not asked for, and their specs are as they were
        self.models_only = False  # are asked for
        self._known = Known(b"", b"", {})
        self._world = b""
        self._recorded = b""
        self._rows: dict[str, int] = {}
        self._before: dict[str, tuple[list[str], bytes, bytes]] = {}  # of the others: the folder, and that in build/

    @property
    def serves(self) -> dict[str, dict[str, str]]:
        """By model whose spec is not read: Triton's models, and what each is."""
        return {name: record.serves for name, record in (*self.apart.items(), *self.models.items())}

    def look(self, names: Sequence[str], words: Sequence[str] = sys.argv) -> None:
        """Find them among all models. To be called before a spec is read."""
        if words[1:2] and words[1] in NOTHING_RUNS:
            return
        self._known, self._world, self._recorded = _read_table(), _world(), _recorded()
        self._rows = {} if self._same_rows else _read_rows()
        asked = requested_models(words, names)
        self.models_only = asked is not None
        if asked is not None and self._known.world == self._world:
            records = {name: record for name in names if (record := self._known.models.get(name))}
            wanted = {name: record for name, record in records.items() if not asked or name in asked}
            unchanged = itertools.compress(wanted.items(), _unchanged([*wanted.values()]))
            self.models = {name: record for name, record in unchanged if self._holds(record)}
            self.named = [name for name in self.models if name in asked]
            self.apart = {
                name: record
                for name, record in records.items()
                if name not in wanted and stat_signatures(record.folder) == record.folder_signatures
            }
        for name in names:
            if name not in self.models and name not in self.apart:
                folder = list(_below(f"{MODELS}/{name}"))
                self._before[name] = folder, stat_signatures(folder), stat_signatures([f"{BUILD}/{name}"])
        if self._before and self._same_rows:
            self._rows = _read_rows()

    def _holds(self, record: Record) -> bool:
        """Whether what is no file of a record's is as it was."""
        return self._recorded_as(record) and (record.gpu is None or record.gpu == str(hardware.gpu()))

    @property
    def _same_rows(self) -> bool:
        """Whether nothing was recorded between what is remembered and this run's start."""
        return self._recorded == self._known.recorded

    def _recorded_as(self, record: Record) -> bool:
        return self._same_rows or all(self._rows.get(task) == row for task, row in record.rows.items())

    def note(self, tasks: dict[str, Any], ended: dict[str, run_results.TaskResult], said: dict[str, str]) -> None:
        """Remember the models of which every task was judged in this run, and none is outdated.

        said: the lines on tasks that are not for this machine.
        """
        moved = not self._same_rows and self._recorded == _recorded()  # and nothing was recorded in this run
        if not (self._before or moved) or not digest.remembers or _recently_edited():
            return
        found = {name: record for name in self._before if (record := self._record(name, tasks, ended, said))}
        same = self._known.world == self._world
        known = self._known.models.items() if same else ()
        if found or not same or moved:
            models = {name: record for name, record in known if self._recorded_as(record)} | found
            with suppress(OSError), atomic_files.scratch_dir() as folder:
                draft = f"{folder}/settled"
                Path(draft).write_bytes(msgspec.msgpack.encode(Known(self._world, self._recorded, models)))
                os.replace(draft, TABLE)

    def _record(
        self, name: str, tasks: dict[str, Any], ended: dict[str, run_results.TaskResult], said: dict[str, str]
    ) -> Record | None:
        """What there is to remember of a model; None where it is outdated, or cannot be told for sure."""
        if name not in tasks:
            return None
        chain = [task for task in task_graph.required_tasks(tasks, [name]) if tasks[task].actions]
        states = [ended[task].state if task in ended else None for task in chain]
        stages = [stage for task in chain if (stage := stage_of(tasks[task]))]
        if not set(states) <= NOTHING_TO_DO or len(stages) != len(chain):
            return None
        folder, folder_signatures, built = self._before[name]
        seen: dict[str, StatSignature] = {}
        for stage, state in zip(stages, states, strict=True):
            judged = state == TaskState.UP_TO_DATE
            for path in (*stage.dependency_paths(), *stage.outputs.values()):
                if not path.startswith("build_tasks/") and not _judged(path, seen, judged):
                    return None
            for elsewhere in filter(None, stage.external_inputs.values()):
                if not _judged(elsewhere, seen, False):
                    return None
        paths = sorted(seen.keys() - set(folder))
        return Record(
            folder=folder,
            folder_signatures=folder_signatures,
            paths=[f"{BUILD}/{name}", *paths],
            stat_signatures=built + _packed([number for path in paths for number in seen[path]]),
            rows={task: self._rows.get(task) for task in chain},
            gpu=str(hardware.gpu())
            if any(stage.missing_requirements is not nothing_missing for stage in stages)
            else None,
            serves=stages[0].model.triton_models,
            counts={state: states.count(state) for state in NOTHING_TO_DO if state in states},
            said=[said[task] for task in chain if task in said],
            models=run_results.model_rows({task: tasks[task] for task in chain}, chain, ended),
        )


def requested_models(words: Sequence[str], names: Iterable[str]) -> set[str] | None:
    """The models that a command line names, none where it means all; None where it asks for anything else."""
    if Path(words[0]).stem not in ("doit", "__main__"):  # as a script, or by `python -m doit`
        return None
    given, known = list(words[1:]), set(names)
    if given[:1] == ["run"]:
        del given[0]
    asked = set()
    while given:
        word = given.pop(0)
        if word in known and word not in RESERVED:
            asked.add(word)
        elif (word == "-n" and given and given[0].isdecimal()) or (word == "-r" and given[:1] == ["quiet"]):
            del given[0]
        else:
            return None
    return asked


def stat_signatures(paths: Iterable[str]) -> bytes:
    """What stat says of files: device, inode, size and both times of each."""
    found: list[int] = []
    for path in paths:  # of a thousand models some 40,000: a call for each would show
        try:
            status = os.stat(path)
        except OSError:
            found += ABSENT
        else:
            found += (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return _packed(found)


def _unchanged(records: Sequence[Record]) -> list[bool]:
    """Whether stat says of each record's files what it said then; of many, a child process is asked about half.

    Threads would not do: a stat is too brief for them to take turns. Of a child that died nothing is unchanged.
    """
    if len(records) < WORTH_A_CHILD or sys.platform != "linux" or resources.cores() < 2:
        return [_is_unchanged(record) for record in records]
    half = len(records) // 2
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with open(writing, "wb") as answers:
                answers.write(bytes(map(_is_unchanged, records[half:])))
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as answers:
        here = [_is_unchanged(record) for record in records[:half]]
        there = answers.read().ljust(len(records) - half, b"\0")
    os.waitpid(child, 0)
    return [*here, *map(bool, there)]


def _is_unchanged(record: Record) -> bool:
    return (
        stat_signatures(record.folder) == record.folder_signatures
        and stat_signatures(record.paths) == record.stat_signatures
    )


def _packed(found: list[int]) -> bytes:
    try:
        return array.array("q", found).tobytes()
    except OverflowError:  # of an inode's number
        return array.array("q", [number & (1 << 63) - 1 for number in found]).tobytes()


def _judged(path: str, seen: dict[str, StatSignature], must: bool) -> bool:
    """Add to `seen` what a path, and all below it, was when it was judged; False where that is not known for sure.

    must: whether it was there.
    """
    if path in seen:
        return True
    identity = digest.identity(path)
    if identity is None:
        if must or os.path.exists(path):
            return False
        seen[path] = ABSENT
        return True
    seen[path] = identity
    if os.path.isdir(path):
        return all(_judged(f"{path}/{name}", seen, True) for name in os.listdir(path) if name != "__pycache__")
    return True


def _below(folder: str) -> Iterator[str]:
    """A folder, and all that is below it, but what Python leaves there."""
    yield folder
    with suppress(OSError):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name == "__pycache__":
                continue
            if entry.is_dir():
                yield from _below(entry.path)
            else:
                yield entry.path


def _world() -> bytes:
    """What all models depend on: this project, and whatever distributions are installed, each as stat sees it."""
    here = os.getcwd()
    libraries = [path for path in sys.path if path not in ("", here)]
    return f"{sys.version}\n{libraries}\n".encode() + stat_signatures([*libraries, *_project()])


def _project() -> list[str]:
    """Its files, there or not."""
    return [path for part in PROJECT for path in _below(part)]


def _recently_edited() -> bool:
    """Whether the project may have been edited while it was imported."""
    newest = max(os.stat(path).st_ctime_ns for path in _project() if os.path.exists(path))
    return time.time_ns() - newest < 2_000_000_000


def _read_table() -> Known:
    try:
        return msgspec.msgpack.decode(Path(TABLE).read_bytes(), type=Known)
    except (OSError, msgspec.MsgspecError):
        return Known(b"", b"", {})


def _recorded() -> bytes:
    """What another record in doit's table changes: SQLite counts its transactions there.

    Source: sqlite.org, fileformat.html, "File change counter".
    """
    with suppress(OSError), open(STATE_DB, "rb") as table:
        return stat_signatures([STATE_DB]) + table.read(28)[24:]
    return b""


def _read_rows() -> dict[str, int]:
    """The number of each task's row in doit's table: to record a task anew gives it another one."""
    if not os.path.exists(STATE_DB):
        return {}
    try:
        with closing(sqlite3.connect(f"file:{STATE_DB}?mode=ro", uri=True, timeout=30)) as records:
            return dict(records.execute("select task_id, rowid from doit"))
    except sqlite3.DatabaseError:
        return {}


noop_cache = NoopCache()
