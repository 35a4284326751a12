"""Damage to doit's records, and locks on them: a line says what happens, and the next run builds the right repository.

The stages write a few bytes, so that a run takes half a second.
"""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from build_tasks.runtime import atomic_files
from tests.support.light_stages import use_light_stages
from tests.support.project import Project, Run

STATE = "build/.doit.sqlite3"
SPEC = """\
formats = ["torchscript", "onnx"]

[architecture]
timm = "resnet18"

[weights]
source = "random://0"
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with light stages, built; tests copy it."""
    project = Project(tmp_path_factory.mktemp("original") / "project")
    use_light_stages(project)
    project.model("net", SPEC)
    project.built()
    return project


@pytest.fixture
def project(original: Project, tmp_path: Path) -> Project:
    return original.copy(tmp_path / "project")


def execute(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def other_schema(path: Path) -> None:
    execute(path, "create table places (name text)", "insert into places values ('here')")


def other_columns(path: Path) -> None:
    execute(path, "create table doit (name text, value blob)", "insert into doit values ('weights:net', x'ff')")


def zero(path: Path, start: int, end: int) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(end - start))


def folder(path: Path) -> None:
    path.mkdir()
    (path / "note").write_text("of a person")


def content(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


def set_every(value: str) -> Callable[[Path], None]:
    return lambda path: execute(path, f"update doit set task_data = {value}")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut in the middle": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut within its first page": lambda path: os.truncate(path, 700),
    "cut to a few bytes": lambda path: os.truncate(path, 10),
    "garbage": content(os.urandom(20_000)),
    "dbm": content(b"\xce\x9a\x57\x13" + bytes(20_000)),
    "JSON": content(b'{"weights:net": {"deps:": []}}\n'),
    "the table of another program": lambda path: replace(path, other_schema),
    "a table of other columns": lambda path: replace(path, other_columns),
    "zeros in the middle": lambda path: zero(path, 8192, path.stat().st_size - 8192),
    "zeros but for the schema": lambda path: zero(path, 4096, path.stat().st_size),
    "a folder": lambda path: replace(path, folder),
    "a FIFO": lambda path: replace(path, os.mkfifo),
    "a device": lambda path: replace(path, lambda link: link.symlink_to("/dev/zero")),
    "a link to nowhere": lambda path: replace(path, lambda link: link.symlink_to("/nowhere/state.sqlite3")),
    "a link to itself": lambda path: replace(path, lambda link: link.symlink_to(link.name)),
    "a folder as its journal": lambda path: folder(path.with_name(f"{path.name}-journal")),
    "a FIFO as its journal": lambda path: os.mkfifo(f"{path}-journal"),
}
UNREADABLE_RECORDS = {
    "no JSON": set_every("'{'"),
    "no UTF-8": set_every("x'ff'"),
    "nothing": set_every("null"),
    "a number": set_every("5"),
    "a list": set_every("'[]'"),
    "values that are a list": set_every("""'{"_values_:": []}'"""),
    "values of other types": set_every("""'{"_values_:": {"outputs": 5, "modules": "a", "notes": 1}}'"""),
    "values of which one is missing": set_every("replace(task_data, 'settings', 'settinqs')"),
    "dependencies that are a number": set_every('replace(task_data, \'"deps:": [\', \'"deps:": 5, "x": [\')'),
    "nested too deeply": set_every(f"'{'[' * 100_000}'"),
}


def short_and_long(names: Iterable[str], *short: str) -> list[Any]:
    """All names, as parameters of a test; those that are not among `short` run in the long form only."""
    return [name if name in short else pytest.param(name, marks=pytest.mark.long) for name in names]


def entries(project: Project) -> dict[str, tuple[int, int]]:
    """Every entry of build/, with what tells whether it was changed."""
    return {
        str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns)
        for path in [project / "build", *(project / "build").rglob("*")]
    }


def lines_about(run: Run) -> list[str]:
    assert "Traceback" not in run.out, run.out
    lines = [line for line in run.out.splitlines() if line.startswith(STATE)]
    assert all(len(line) <= 300 for line in lines)
    return lines


@pytest.mark.parametrize(
    "kind", short_and_long(DAMAGE, "cut in the middle", "a table of other columns", "a folder", "a FIFO")
)
def test_a_damaged_file_is_moved_aside(original: Project, project: Project, kind: str) -> None:
    DAMAGE[kind](project / STATE)
    before = entries(project)
    plan = project.built("plan")
    (line,) = lines_about(plan)
    assert "`doit` moves it to build/.doit.sqlite3.damaged" in line
    assert entries(project) == before
    run = project.built()
    (line,) = lines_about(run)
    assert "It is now build/.doit.sqlite3.damaged" in line
    assert os.path.lexists(project / f"{STATE}.damaged")
    assert project.tree() == original.tree()
    planned = [line.split()[2:4] for line in plan.out.splitlines() if line.startswith("to run")]
    assert sorted(":".join(words) for words in planned) == run.ran
    assert "up to date" in project.built().out
    assert lines_about(project.built("plan")) == []


@pytest.mark.parametrize(
    "records", short_and_long(UNREADABLE_RECORDS, "a list", "values of other types", "values of which one is missing")
)
def test_records_that_cannot_be_read_are_none(original: Project, project: Project, records: str) -> None:
    UNREADABLE_RECORDS[records](project / STATE)
    assert lines_about(project.built("plan")) == []
    assert lines_about(project.built("list", "--all", "--status")) == []
    run = project.built()
    assert lines_about(run) == []
    assert "publish:net" in run.ran
    assert project.tree() == original.tree()
    assert "up to date" in project.built().out


COMMANDS = {
    "list --all --status": 0,
    "plan": 0,
    "info weights:net": 1,  # doit's code for a task that is not up to date
    "forget weights:net": 0,
    "forget --all": 0,
    "ignore prune": 0,
    "clean --forget weights:net": 0,
    "reset-dep weights:net": 0,
    "report": 0,
    "-r json weights:net": 0,
    "-n 2 net": 0,
}


@pytest.mark.parametrize(
    "command", short_and_long(COMMANDS, "list --all --status", "forget weights:net", "reset-dep weights:net", "report")
)
def test_every_command_works_on_a_damaged_file(project: Project, command: str) -> None:
    content(b"garbage" * 1000)(project / STATE)
    run = project.doit(*command.split())
    assert run.code == COMMANDS[command], run.out
    (line,) = lines_about(run)
    assert "cannot be used (file is not a database)" in line
    project.built()
    assert "up to date" in project.built("net").out


def test_what_is_left_of_the_records_is_used(project: Project) -> None:
    """A page in the middle is damaged. A record that can be read is compared with the files, as ever."""
    data = (project / STATE).read_bytes()
    pages = [start for start in range(0, len(data), 4096) if data[start] == 13]  # with records, not parts of long ones
    zero(project / STATE, pages[len(pages) // 2], pages[len(pages) // 2] + 4096)
    run = project.built()
    (line,) = lines_about(run)
    kept = int(line.split("; its ")[1].split()[0])
    assert 5 < kept < 20
    assert 1 <= len(run.ran) < 10


@pytest.mark.parametrize("file", ["absent", "empty"])
def test_a_file_without_records_is_a_new_one(original: Project, project: Project, file: str) -> None:
    (project / STATE).unlink()
    if file == "empty":
        (project / STATE).touch()
    before = entries(project)
    assert project.plan()["to run"]
    assert entries(project) == before
    run = project.built()
    assert lines_about(run) == []
    assert project.tree() == original.tree()
    assert "up to date" in project.built().out


def killed_after(path: Path, *statements: str) -> None:
    """Let a process be killed after some statements."""
    code = (
        "import os, sqlite3, sys\nconnection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "for statement in sys.argv[2:]: connection.execute(statement)\nos.kill(os.getpid(), 9)"
    )
    run = subprocess.run([sys.executable, "-c", code, path, *statements], check=False)
    assert run.returncode == -signal.SIGKILL


def leave_hot_journal(path: Path) -> None:
    """Leave half a transaction in the file, and in the journal the means to undo it."""
    killed_after(path, "pragma cache_size = 1", "begin", "update doit set task_data = upper(task_data)")
    assert path.with_name(f"{path.name}-journal").stat().st_size > 0


def leave_write_ahead_log(path: Path) -> None:
    """Leave one record in the log alone."""
    with closing(sqlite3.connect(path)) as connection:
        (record,) = connection.execute("select task_data from doit where task_id = 'weights:net'").fetchone()
    execute(path, "delete from doit where task_id = 'weights:net'", "vacuum")
    text = record.replace("'", "''")
    killed_after(path, "pragma journal_mode = wal", f"insert into doit values ('weights:net', '{text}')")
    assert path.with_name(f"{path.name}-wal").stat().st_size > 0


@pytest.mark.parametrize("leave", [leave_hot_journal, leave_write_ahead_log])
def test_what_a_kill_left_in_a_journal_is_applied(project: Project, leave: Callable[[Path], None]) -> None:
    leave(project / STATE)
    before = entries(project)
    plan = project.built("plan")
    assert plan.out == "16 up to date\n"
    assert entries(project) == before
    assert lines_about(project.built("list", "--all", "--status")) == []
    run = project.built()
    assert run.out == "16 up to date\n"


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Mount a folder over itself, read-only: root may write whatever the modes say."""
    try:
        subprocess.run(["mount", "--bind", folder, folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine does not permit a mount: {error}")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("journal", [True, False])
def test_a_folder_that_cannot_be_written(project: Project, journal: bool) -> None:
    if journal:
        leave_hot_journal(project / STATE)
    with read_only(project / "build"):
        for command in ("plan", "list --all --status", "info weights:net"):
            run = project.built(*command.split())
            assert lines_about(run) == []
        run = project.doit("forget", "weights:net")
        assert run.code == 3
        (line,) = lines_about(Run(0, run.out.replace("ERROR: ", "")))
        assert line.startswith(f"{STATE} cannot be written: make it and build/ writable")
    assert "up to date" in project.built().out


@contextmanager
def locked(path: Path, kind: str = "exclusive") -> Iterator[sqlite3.Connection]:
    """Hold SQLite's lock of a file until the end or a commit: against writers, or "exclusive" against readers too."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"begin {kind}")
        yield connection


def shorten_waiting(project: Project) -> None:
    limits = "NOTICE_AFTER, LOCK_LIMIT = "
    project.edit("build_tasks/doit_plugin/state_file.py", f"{limits}1, 30", f"{limits}1, 2")


def test_a_second_run_waits_for_a_lock_and_says_for_whom(project: Project) -> None:
    with locked(project / STATE) as connection:
        process = project.start("net")
        assert process.stdout
        line = process.stdout.readline().rstrip()
        connection.execute("commit")
    out, _ = process.communicate(timeout=60)
    command = Path("/proc/self/cmdline").read_text().split("\0")[0]
    assert line.startswith(f"{STATE} is locked by process {os.getpid()} ({command}")
    assert line.endswith(f"on the host {os.uname().nodename}: waiting, for 30 s at most")
    assert Run(0, out).out == "15 up to date\n"


@pytest.mark.parametrize(
    "command",
    short_and_long(
        ["net", "plan", "forget net", "ignore net", "list --all --status", "info net"], "net", "plan", "forget net"
    ),
)
def test_a_lock_that_is_held_for_long_ends_the_command(project: Project, command: str) -> None:
    project.edit(
        "build_tasks/doit_plugin/state_file.py", "NOTICE_AFTER, LOCK_LIMIT = 1, 30", "NOTICE_AFTER, LOCK_LIMIT = 1, 2"
    )
    with locked(project / STATE):
        run = project.doit(*command.split())
    assert run.code == 3, run.out
    first, last = [line for line in run.out.splitlines() if STATE in line]
    assert "Traceback" not in run.out
    assert first.endswith(": waiting, for 2 s at most")
    assert last.startswith(f"ERROR: {STATE} is locked by process {os.getpid()} (")
    assert last.endswith(", also after 2 s: wait until that has ended, or end it, and run doit again")
    assert len(last) <= 300
    assert "up to date" in project.built("net").out


def add_tasks(project: Project, **actions: str) -> None:
    """Add tasks with one command each to a project's dodo.py."""
    with (project / "dodo.py").open("a", encoding="utf-8") as file:
        for name, command in actions.items():
            file.write(f"\n\ndef task_{name}():\n    return {{'actions': [{command!r}]}}\n")


@pytest.mark.parametrize(
    ("kind", "code", "last"),
    [
        ("immediate", 1, "; what was built last is not recorded, and will be built again"),
        ("exclusive", 2, ", also after 2 s: wait until that has ended, or end it, and run doit again"),
    ],
)
def test_a_lock_during_a_run_is_reported(project: Project, kind: str, code: int, last: str) -> None:
    shorten_waiting(project)
    add_tasks(project, first="touch begun; sleep 1", second="true")
    process = project.start("first", "second", "net")
    while not (project / "begun").exists():
        time.sleep(0.01)
    with locked(project / STATE, kind):
        out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    assert "Traceback" not in out
    assert out.count(": waiting, for 2 s at most\n") == 1
    lines = [line for line in out.splitlines() if f"{STATE} is locked by process {os.getpid()} (" in line]
    assert lines[-1].endswith(last)
    assert all(", also after 2 s" in line for line in lines[1:])


def test_no_lock_is_held_between_tasks_after_a_failure(project: Project) -> None:
    write = f"{sys.executable} -c \"import sqlite3; sqlite3.connect('{STATE}', timeout=0).execute('begin exclusive')\""
    add_tasks(project, fails="false", writes=write)
    run = project.doit("fails", "writes")
    assert (run.code, run.failed, run.ran) == (1, ["fails:Command"], ["writes"]), run.out
    execute(project / STATE, "delete from doit where task_id = 'writes'")
    assert project.built("writes").ran == ["writes"]


def test_two_runs_find_the_same_damage(original: Project, project: Project) -> None:
    content(b"garbage" * 1000)(project / STATE)
    processes = [project.start("net") for _ in range(4)]
    runs = [Run(process.wait(), process.communicate()[0]) for process in processes]
    assert [run.code for run in runs] == [0] * 4, [run.out for run in runs]
    assert sum(len(lines_about(run)) for run in runs) == 1
    assert sorted(path.name for path in (project / "build").glob(".doit*")) == [
        ".doit.sqlite3",
        ".doit.sqlite3.damaged",
    ]
    assert project.tree() == original.tree()
    assert "up to date" in project.built("net").out


CACHES = ["build/.digests.sqlite3", "build/.noop_cache", "build/report.json", "build/.scratch", "build/.publishing"]
OTHERS: dict[str, Callable[[Path], None]] = {
    "garbage": content(os.urandom(5000)),
    "the table of another program": other_schema,
    "a folder": folder,
    "a FIFO": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nowhere": lambda path: path.symlink_to("/nowhere/file"),
}


@pytest.mark.parametrize("kind", short_and_long(OTHERS, "garbage", "a FIFO"))
def test_other_files_in_build_are_rebuilt_without_a_word(original: Project, project: Project, kind: str) -> None:
    for path in CACHES:
        atomic_files.remove_tree(str(project / path))
        OTHERS[kind](project / path)
    before = entries(project)
    assert project.built("plan").out == "16 up to date\n"
    assert entries(project) == before
    assert project.built("report").out == "build/report.html\n"
    assert project.built().out == "16 up to date\n"
    project.edit("models/net/model.toml", "random://0", "random://1")
    assert "publish:net" in project.built().ran
    project.edit("models/net/model.toml", "random://1", "random://0")
    project.built("report")
    time.sleep(2.1)  # the no-op cache is not written while an edit is recent
    project.built()
    assert project.tree() == original.tree()
    for path in ("build/.digests.sqlite3", "build/.noop_cache", "build/report.json"):
        assert (project / path).is_file()
    assert (project / "build/.scratch").is_dir()
