"""A disk that is full at any point of a build: it is said so, nothing is half-written, and the next run goes on."""

import compileall
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Project, Run, add_tiny

from build_tasks import files

if sys.platform != "linux":
    pytestmark = pytest.mark.skip("a file system in memory, as Linux has it")

LARGE = 100_000  # kB


class Disk:
    """A file system of its own, in memory."""

    def __init__(self, folder: Path):
        self.folder = folder

    def leave(self, free: int) -> None:
        """Make it so large that so many kB are free."""
        size = shutil.disk_usage(self.folder).used // 1024 + free
        subprocess.run(["mount", "-o", f"remount,size={size}k", self.folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={LARGE}k", "none", str(folder)]
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


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
def test_a_build_that_fills_the_disk(disk: Disk, free: int, built_tiny: Project, tiny_weights: Path) -> None:
    project, expected = Project(disk.folder / "project"), built_tiny.tree()
    add_tiny(project, tiny_weights)
    compileall.compile_file(str(project / "dodo.py"), quiet=2)  # which Python 3.11 would cut short: troubleshooting.md
    disk.leave(free)
    said = complaints(project.doit())
    assert said or free >= 8000
    published = project.tree()
    for model in {Path(path).parts[0] for path in published}:
        whole = {path: content for path, content in expected.items() if path.startswith(f"{model}/")}
        assert {path: content for path, content in published.items() if path.startswith(f"{model}/")} == whole
    disk.leave(LARGE)
    project.built()
    assert project.tree() == expected


def test_the_record_of_what_was_built_does_not_fit(
    disk: Disk, built_tiny: Project, copy_of: Callable[[Project], Project]
) -> None:
    """A few kB are left, for config.pbtxt, the published folder, or doit's table."""
    project = copy_of(built_tiny)
    shutil.copytree(project.root, disk.folder / "project", copy_function=shutil.copy2)
    project.root = disk.folder / "project"
    project.built()
    failed = set()
    for count, free in enumerate([0, 4, 8, 16, 24, 32, 64], start=2):
        spec = project / "models/tiny/model.toml"
        spec.write_text(spec.read_text().partition("[[triton")[0] + f"[[triton.instance_group]]\ncount = {count}\n")
        disk.leave(free)
        failed |= {line.split()[1].rstrip(":") for line in complaints(project.doit("tiny"))}
        disk.leave(LARGE)
        project.built()
        assert b"count: %d" % count in project.tree()["tiny/config.pbtxt"]
    assert failed == {"config", "publish", "build/.doit.sqlite3"}


def test_a_folder_that_does_not_fit_is_refused_in_one_line(disk: Disk, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (source / name).write_bytes(b"weights" * 10_000)
    disk.leave(8)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: .*$"):
        files.copy(str(source), str(disk.folder / "copy"))
