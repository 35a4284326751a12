"""A disk that is full at any point of a build: it is said so, nothing is half-written, and the next run goes on."""

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
    pytestmark = pytest.mark.skip("a file system in memory, as Linux has it")

LARGE = 100_000  # kB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in memory. multiprocessing's resource tracker, in it, ends a moment after its doit."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={LARGE}k", "none", lazily=True) as folder:
        yield folder


def leave(disk: Path, free: int) -> None:
    """Make it so large that so many kB are free."""
    size = shutil.disk_usage(disk).used // 1024 + free
    subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)


def complaints(run: Run) -> list[str]:
    """What a run says of what failed, each of which must be the disk's fault."""
    assert "Traceback" not in run.out, run.out
    lines = [line for line in run.out.splitlines() if line.startswith(("✗", "ERROR:"))]
    assert all("no space left" in line.lower() or "no space is left on the disk of build/" in line for line in lines)
    assert run.code == 0 if not lines else run.code in (1, 3)
    return lines


# Of what a build takes in kB: doit's table, the weights, reference.json, model.pt, its copy, and model.onnx's.
BUILDS = [*range(20, 120, 20), *range(900, 12000, 900)]
BRIEF = [0, 1600, 7500]


@pytest.mark.parametrize("free", [*BRIEF, *(pytest.param(free, marks=pytest.mark.long) for free in BUILDS)])
def test_a_build_that_fills_the_disk(disk: Path, free: int, built_tiny: Project, tiny_weights: Path) -> None:
    project, expected = Project(disk / "project"), built_tiny.tree()
    add_tiny(project, tiny_weights)
    compileall.compile_file(str(project / "dodo.py"), quiet=2)  # which Python 3.11 would cut short: troubleshooting.md
    leave(disk, free)
    said = complaints(project.doit())
    assert said or free >= 8000
    published = project.tree()
    models = {Path(path).parts[0] for path in published}
    assert published == {path: content for path, content in expected.items() if Path(path).parts[0] in models}
    leave(disk, LARGE)
    project.built()
    assert project.tree() == expected


def test_the_record_of_what_was_built_does_not_fit(disk: Path, built_tiny: Project) -> None:
    """A few kB are left, for config.pbtxt, the published folder, or doit's table."""
    project = built_tiny.copy(disk / "project")
    project.built()
    failed = set()
    for count, free in enumerate([0, 4, 8, 16, 24, 32, 64], start=2):
        spec = project / "models/tiny/model.toml"
        spec.write_text(spec.read_text().partition("[[triton")[0] + f"[[triton.instance_group]]\ncount = {count}\n")
        leave(disk, free)
        failed |= {line.split()[1].rstrip(":") for line in complaints(project.doit("tiny"))}
        leave(disk, LARGE)
        project.built()
        assert b"count: %d" % count in project.tree()["tiny/config.pbtxt"]
    assert failed == {"config", "publish", "build/.doit.sqlite3"}


def test_a_folder_that_does_not_fit_is_refused_in_one_line(disk: Path, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (source / name).write_bytes(b"weights" * 10_000)
    leave(disk, 8)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: .*$"):
        atomic_files.copy(str(source), str(disk / "copy"))


def test_a_crash_for_want_of_space_elsewhere_keeps_the_end_of_its_log(tmp_path: Path) -> None:
    """As where /tmp is full: of a crash without a reason, its log is all there is."""
    said = "the stage's process was killed by SIGABRT\n  | write: No space left on device\n(the whole log: a.log)"
    with pytest.raises(worker.CrashError) as crash, resources.explain_full_disk(str(tmp_path)):
        raise worker.CrashError(said)
    assert str(crash.value) == said
