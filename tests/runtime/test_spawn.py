"""Stages on a system without fork and flock (Windows): each child is a new process, and builds the same files."""

import signal
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import add_with_converter, session_ended
from tests.support.project import Project

if sys.platform != "linux":
    pytestmark = pytest.mark.skip("these tests hide fork and fcntl, which Linux has")

NO_FORK = """\
import multiprocessing
import sys

multiprocessing.get_all_start_methods = lambda: ["spawn"]
if sys.argv[0].endswith("doit"):  # atomic_files.py finds none on Windows; libraries in children may need it
    sys.modules["fcntl"] = None
"""


@pytest.fixture
def no_fork(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "no fork").mkdir()
    (tmp_path / "no fork/sitecustomize.py").write_text(NO_FORK)
    return {"PYTHONPATH": str(tmp_path / "no fork")}


@pytest.mark.long
def test_children_that_are_spawned_build_the_same(tiny: Project, built_tiny: Project, no_fork: dict[str, str]) -> None:
    run = tiny.built("-n", "2", **no_fork)
    assert "weights:tiny" in run.ran
    assert tiny.tree() == built_tiny.tree()
    assert tiny.built(**no_fork).ran == []


def test_a_spawned_child_that_crashes_is_a_failed_task(
    project: Project, tiny_weights: Path, no_fork: dict[str, str]
) -> None:
    add_with_converter(project, tiny_weights, "import os; print('last words', flush=True); os.abort()")
    run = project.doit("weights:tiny", **no_fork)
    assert (run.code, run.failed) == (2, ["weights:tiny"])
    assert "killed by SIGABRT" in run.out
    assert "  | last words\n" in run.out


def test_an_interrupted_run_leaves_no_spawned_child(
    project: Project, tiny_weights: Path, no_fork: dict[str, str]
) -> None:
    add_with_converter(project, tiny_weights, "import time; open('started', 'w').close(); time.sleep(600)")
    process = project.start("weights:tiny", **no_fork)
    deadline = time.monotonic() + 120
    while not (project / "started").exists():
        assert time.monotonic() < deadline, "the converter has not started"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert session_ended(process.pid)
