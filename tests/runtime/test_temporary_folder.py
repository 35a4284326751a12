"""The temporary folder of a run: nothing is left in TMPDIR, and its path may be long."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from build_tasks.runtime import temporary_folder
from tests.support.processes import add_with_converter, session_ended
from tests.support.project import ENVIRONMENT, ROOT, Project

if sys.platform != "linux":
    pytestmark = pytest.mark.skip("needs signals and file locks as in Linux")


def started(project: Project, folder: Path) -> "subprocess.Popen[str]":
    """Start doit, and return it when its stage runs."""
    mark = project / "started"
    mark.unlink(missing_ok=True)
    process = project.start("weights:tiny", TMPDIR=str(folder))
    deadline = time.monotonic() + 120
    while not mark.exists():
        assert time.monotonic() < deadline, "the stage has not started"
        time.sleep(0.05)
    return process


def test_nothing_is_left_after_kills_also_with_a_long_path(
    project: Project, tiny_weights: Path, tmp_path: Path
) -> None:
    folder = tmp_path / ("long " * 24)  # a socket's path has at most 107 bytes
    folder.mkdir()
    add_with_converter(project, tiny_weights, "import time; open('started', 'w').close(); time.sleep(600)")

    process = started(project, folder)
    (left,) = folder.iterdir()
    os.killpg(process.pid, signal.SIGKILL)  # doit, the fork server and the stage
    process.communicate()
    assert list(left.rglob("listener-*")), "nobody could remove it"

    process = started(project, folder)
    assert left not in folder.iterdir()
    process.kill()  # doit alone
    process.communicate()
    assert session_ended(process.pid)
    assert list(folder.iterdir()) == []

    converter = project / "models/tiny/convert.py"
    converter.write_text("import tempfile\n\ndef convert(state):\n    tempfile.mkdtemp()\n    return state\n")
    project.built("weights:tiny", TMPDIR=str(folder))
    assert list(folder.iterdir()) == []


def test_only_folders_without_a_process_are_removed(tmp_path: Path) -> None:
    other = tmp_path / "pymp-other"
    other.mkdir()
    (tmp_path / f"{temporary_folder.PREFIX}file").touch()
    (tmp_path / f"{temporary_folder.PREFIX}link").symlink_to(other)
    left = tmp_path / f"{temporary_folder.PREFIX}left"
    left.mkdir()
    code = "from build_tasks.runtime import temporary_folder; print(temporary_folder.folder(), flush=True); input()"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env={**ENVIRONMENT, "TMPDIR": str(tmp_path)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    paths = [process.stdout.readline().strip() for process in processes if process.stdout]
    assert all(map(os.path.isdir, paths))
    assert not left.exists()
    for process in processes:
        process.communicate("\n")
    expected = {"pymp-other", f"{temporary_folder.PREFIX}file", f"{temporary_folder.PREFIX}link"}
    assert set(os.listdir(tmp_path)) == expected


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_wrong_TMPDIR_is_no_reason_to_fail(name: str, tmp_path: Path) -> None:  # noqa: N802
    """Python then takes /tmp, and the processes of stages get a folder that exists."""
    (tmp_path / "file").touch()
    code = "from build_tasks.runtime import temporary_folder; print(temporary_folder.folder())"
    environment = {**ENVIRONMENT, "TMPDIR": str(tmp_path / name)}
    path = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True).strip()
    assert not path.startswith(str(tmp_path))
    assert not os.path.exists(path)


def test_without_any_folder_there_is_one_line(tmp_path: Path) -> None:
    code = (
        "import sys, tempfile; from build_tasks.errors import UserError; from build_tasks.runtime import "
        "temporary_folder; tempfile.tempdir = sys.argv[1]\n"
        "try: temporary_folder.folder()\nexcept UserError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "missing")]
    out = subprocess.check_output(command, cwd=ROOT, env=ENVIRONMENT, text=True)
    assert out.startswith("TMPDIR: expected a folder that this user can write to: ")
    assert out.count("\n") == 1
