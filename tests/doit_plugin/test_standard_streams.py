"""Output that cannot be shown, and signals in the first seconds: no command ends differently, or with a traceback."""

import fcntl
import functools
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from build_tasks.doit_plugin import standard_streams
from tests.support.light_stages import use_light_stages
from tests.support.project import DOIT, ENVIRONMENT, Project

if sys.platform != "linux":
    pytestmark = pytest.mark.skip("needs /dev/full, and signals as in Linux")

SPEC = """\
formats = ["torchscript", "onnx"]

[architecture]
timm = "resnet18"

[weights]
source = "random://0"
"""
WITH_CODE = '"$@"; echo $? >code'
# How doit is started: a line of the shell, and further environment variables. "$@" is doit with its arguments.
STREAMS: dict[str, tuple[str, dict[str, str]]] = {
    "the reader has gone": ('{ sleep 0.1; "$@"; } | true', {}),
    "the reader of both has gone": ('{ sleep 0.1; "$@"; } 2>&1 | true', {}),
    "the reader goes after a line": ('{ "$@"; } | head -1', {}),
    "no stdout": ('"$@" >&-', {}),
    "no stderr": ('"$@" 2>&-', {}),
    "no stdin": ('"$@" <&-', {}),
    "no streams": ('"$@" <&- >&- 2>&-', {}),
    "full disk": ('"$@" >/dev/full', {}),
    "full disk for both": ('"$@" >/dev/full 2>&1', {}),
    "only for reading": ('"$@" 1</dev/null', {}),
    "ASCII": ('"$@"', {"PYTHONIOENCODING": "ascii"}),
    "Latin-1": ('"$@"', {"PYTHONIOENCODING": "latin-1:strict"}),
    "POSIX": ('"$@"', {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}),
}
COMMANDS = ("", "-n 2", "-r json", "-r quiet", "list", "list --all --status", "plan", "info publish:net", "help",
            "clean publish:net", "forget", "ignore prune", "report", "new net", "no_such_task", "check")  # fmt: skip
Result = tuple[int, dict[str, bytes]]
ALWAYS = ("", "list")  # the others with one kind of stream each


CASES = [
    pytest.param(
        command, stream, id=f"{command or 'doit'}, {stream}",
        marks=() if command in ALWAYS or number == index % len(STREAMS) else pytest.mark.long,
    )
    for index, command in enumerate(COMMANDS) for number, stream in enumerate(STREAMS)
]  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("streams") / "project")
    use_light_stages(project)
    project.model("net", SPEC)
    project.built()
    return project


def in_shell(project: Project, line: str, command: str, **environment: str) -> tuple[int, str, str]:
    """Run doit in a line of the shell. Returns doit's exit code, and what the line wrote to stdout and stderr."""
    run = subprocess.run(
        ["sh", "-c", line, "sh", "sh", "-c", WITH_CODE, "sh", DOIT, *command.split()],
        cwd=project.root, env={**ENVIRONMENT, **environment}, capture_output=True, check=False, timeout=100,
    )  # fmt: skip
    return int((project / "code").read_text()), run.stdout.decode(errors="replace"), run.stderr.decode()


@pytest.fixture(scope="module")
def usual(built: Project, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Result]:
    """A function that returns how a command ends with usual streams."""
    return functools.cache(lambda command: result_of(built, tmp_path_factory.mktemp("usual"), command, '"$@"', {}))


def result_of(built: Project, folder: Path, command: str, line: str, environment: dict[str, str]) -> Result:
    """Run doit in a project where there is something to build. Returns its exit code, and what is published then."""
    project = built.copy(folder / "project")
    project.edit("models/net/model.toml", "random://0", "random://1")
    code, _, errors = in_shell(project, line, command, **environment)
    assert "Traceback" not in errors
    assert "Exception" not in errors
    return code, project.tree()


@pytest.mark.parametrize(("command", "stream"), CASES)
def test_no_command_ends_differently(
    built: Project, usual: Callable[[str], Result], tmp_path: Path, command: str, stream: str
) -> None:
    assert result_of(built, tmp_path, command, *STREAMS[stream]) == usual(command)


def test_a_terminal_may_be_closed_while_doit_shows_its_progress(built: Project, tmp_path: Path) -> None:
    project = built.copy(tmp_path / "project")
    project.edit("models/net/model.toml", "random://0", "random://1")
    own_end, doit_end = pty.openpty()
    process = subprocess.Popen(
        [DOIT], cwd=project.root, env={**ENVIRONMENT, "TERM": "xterm"}, stdin=doit_end, stdout=doit_end,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    os.close(doit_end)
    os.read(own_end, 1)
    os.close(own_end)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "standard output: Input/output error; the rest of it is lost\n")
    assert project.tree() != built.tree()
    assert project.built().ran == []


def test_marks_and_other_characters_of_another_encoding_are_replaced(built: Project, tmp_path: Path) -> None:
    project = built.copy(tmp_path / "project")
    project.edit("models/net/model.toml", "random://0", "random://1")
    out = project.terminal(PYTHONIOENCODING="ascii")
    assert re.search(r"\+\S* weights +net", out), out
    assert out.isascii()
    run = project.doit("no_such_täsk", PYTHONIOENCODING="ascii", LC_ALL="C.UTF-8")
    assert run.code == 3
    assert "no_such_t\\xe4sk" in run.out


def test_a_full_disk_is_said_once_and_output_is_lost(built: Project) -> None:
    _, _, errors = in_shell(built, '"$@" >/dev/full', "list --all")
    assert errors == "standard output: No space left on device; the rest of it is lost\n"
    run = built.built("-o", "/dev/full")
    assert run.out == "/dev/full: No space left on device; the rest of it is lost\n"


def test_an_output_file_that_cannot_be_opened_is_refused_in_one_line(built: Project) -> None:
    run = built.doit("-o", "missing/file")
    assert (run.code, run.out) == (3, "ERROR: --output-file missing/file: No such file or directory\n")


def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_everything(built: Project) -> None:
    expected = built.built("help", "run").out
    reader, writer = os.pipe()
    capacity = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writer, b"." * capacity)
    os.set_blocking(writer, False)
    process = subprocess.Popen([DOIT, "help", "run"], cwd=built.root, env=ENVIRONMENT, stdout=writer)
    os.close(writer)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    with open(reader, encoding="utf-8") as output:
        assert output.read() == "." * capacity + expected
    assert process.wait(timeout=60) == 0


def test_descriptors_that_were_closed_are_not_given_to_files(built: Project) -> None:
    """A record of doit with the number 1 would receive what child processes print."""
    with (built / "dodo.py").open("a", encoding="utf-8") as dodo:
        dodo.write("\nos.write(1, b'printed'); os.write(2, b'printed')\n")
    before = built.tree("build")
    _, out, _ = in_shell(built, '"$@" <&- >&- 2>&-; :', "list")
    assert out == ""
    assert built.tree("build") == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["", "serve", "list", "plan", "info prune", "clean", "report"])
def test_a_signal_before_a_run_is_one_line(built: Project, tmp_path: Path, command: str, number: int) -> None:
    project = built.copy(tmp_path / "project")
    dodo = project / "dodo.py"
    dodo.write_text(f"import os\n\nos.kill(os.getpid(), {int(number)})\n{dodo.read_text()}")
    project.edit("models/net/model.toml", "random://0", "random://1")
    run = project.doit(*command.split())
    assert (run.code, run.out) == (128 + number, f"interrupted by {signal.Signals(number).name}\n")


def test_other_encoding_errors_stay_errors() -> None:
    with pytest.raises(UnicodeDecodeError):
        standard_streams.replace_characters(UnicodeDecodeError("ascii", b"\xff", 0, 1, "no character"))
