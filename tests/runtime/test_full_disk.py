"""A disk that is full at any point of a build: the message says so, no file is written half, the next run goes on."""

import compileall
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from build_tasks.runtime import atomic_files, resources, worker
from tests.support.project import Project, Run, add_tiny, mounted

if sys.platform != "linux":
    pytestmark = pytest.mark.skip("needs a file system in memory (tmpfs of Linux)")

LARGE = 100_000  # kB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory. It is unmounted lazily: multiprocessing's resource tracker ends a moment after doit."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={LARGE}k", "none", lazily=True) as folder:
        yield folder


def leave_free(disk: Path, free: int) -> None:
    """Resize a disk so that `free` kB are free."""
    size = shutil.disk_usage(disk).used // 1024 + free
    subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)


def failure_lines(run: Run) -> list[str]:
    """The lines of a run about failures. The reason of each must be the full disk."""
    assert "Traceback" not in run.out, run.out
    lines = [line for line in run.out.splitlines() if line.startswith(("✗", "ERROR:"))]
    assert all("no space left" in line.lower() or "no space is left on the disk of build/" in line for line in lines), (
        run.out
    )
    assert run.code == 0 if not lines else run.code in (1, 3)
    return lines


# kB that are free. A build needs them in this order: doit's table, the weights, reference.json, model.pt, the copy of
# model.pt, the copy of model.onnx.
BUILDS = [*range(20, 120, 20), *range(900, 12000, 900)]
BRIEF = [0, 1600, 7500]


@pytest.mark.parametrize("free", [*BRIEF, *(pytest.param(free, marks=pytest.mark.long) for free in BUILDS)])
def test_a_build_that_fills_the_disk(disk: Path, free: int, built_tiny: Project, tiny_weights: Path) -> None:
    project, expected = Project(disk / "project"), built_tiny.tree()
    add_tiny(project, tiny_weights)
    compileall.compile_file(
        str(project / "dodo.py"), quiet=2
    )  # Python 3.11 would write it half: see docs/how-to/troubleshooting.md
    leave_free(disk, free)
    lines = failure_lines(project.doit())
    assert lines or free >= 8000
    published = project.tree()
    models = {Path(path).parts[0] for path in published}
    assert published == {path: content for path, content in expected.items() if Path(path).parts[0] in models}
    leave_free(disk, LARGE)
    project.built()
    assert project.tree() == expected


def test_the_record_of_what_was_built_does_not_fit(disk: Path, built_tiny: Project) -> None:
    """A few kB are free: enough for config.pbtxt, or for the published folder too, or for doit's table too."""
    project = built_tiny.copy(disk / "project")
    project.built()
    failed = set()
    for count, free in enumerate([0, 4, 8, 16, 24, 32, 64], start=2):
        spec = project / "models/tiny/model.toml"
        spec.write_text(spec.read_text().partition("[[triton")[0] + f"[[triton.instance_group]]\ncount = {count}\n")
        leave_free(disk, free)
        failed |= {line.split()[1].rstrip(":") for line in failure_lines(project.doit("tiny"))}
        leave_free(disk, LARGE)
        project.built()
        assert b"count: %d" % count in project.tree()["tiny/config.pbtxt"]
    assert failed == {"config", "publish", "build/.doit.sqlite3"}


def test_a_folder_that_does_not_fit_is_an_error_of_one_line(disk: Path, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (source / name).write_bytes(b"weights" * 10_000)
    leave_free(disk, 8)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: .*$"):
        atomic_files.copy(str(source), str(disk / "copy"))


def test_a_crash_because_another_disk_is_full_keeps_the_end_of_its_log(tmp_path: Path) -> None:
    """For example if /tmp is full. The log is the only information about a crash without a reason."""
    message = "the stage's process was killed by SIGABRT\n  | write: No space left on device\n(the whole log: a.log)"
    with pytest.raises(worker.CrashError) as crash, resources.explain_full_disk(str(tmp_path)):
        raise worker.CrashError(message)
    assert str(crash.value) == message
