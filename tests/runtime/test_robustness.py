"""Kills, crashes, full disks and two builds at once: nothing is lost, and no file is written half."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import add_with_converter, session_ended, wait_for
from tests.support.project import DOIT, OTHER, Project, Run

if sys.platform != "linux":
    pytestmark = pytest.mark.skip("needs signals, /dev/shm and RLIMIT_FSIZE of Linux")


def assert_complete(project: Project, expected: dict[str, bytes]) -> None:
    """Each published model is absent, or equal to that of a clean build."""
    tree = project.tree()
    for name in ("tiny", "tiny_onnx"):
        published = {path: data for path, data in tree.items() if path.split("/")[0] == name}
        assert published in ({}, {path: data for path, data in expected.items() if path.split("/")[0] == name})


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "killed by SIGKILL, most likely because memory ran out",
        ),
        ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV"),
        ("import os; os._exit(7)", "ended without a result (exit code 7)"),
    ],
    ids=["out of memory", "segfault", "exit"],
)
def test_a_crash_is_one_failed_task_and_other_models_are_built(
    project: Project, tiny_weights: Path, code: str, reason: str
) -> None:
    add_with_converter(project, tiny_weights, code)
    project.model("other", OTHER)
    run = project.doit("-n", "2", "weights:tiny", "weights:other")
    assert run.code == 2
    assert run.failed == ["weights:tiny"]
    assert run.ran == ["weights:other"]
    assert reason in run.out
    assert "the whole log: build/tiny/logs/weights.tiny.log" in run.out
    assert not (project / "build/tiny/weights.safetensors").exists()


def test_a_system_exit_of_a_converter_is_its_error_and_no_crash(project: Project, tiny_weights: Path) -> None:
    add_with_converter(project, tiny_weights, "raise SystemExit('enough')")
    project.model("other", OTHER)
    run = project.doit("-n", "2", "weights:tiny", "weights:other")
    assert (run.code, run.failed, run.ran) == (1, ["weights:tiny"], ["weights:other"])
    assert "models/tiny/convert.py, line " in run.out
    assert "SystemExit: enough" in run.out
    assert not (project / "build/tiny/weights.safetensors").exists()


def test_a_task_after_a_failed_one_is_skipped_and_is_no_crash(project: Project, tiny_weights: Path) -> None:
    add_with_converter(project, tiny_weights, "pass")
    (project / "models/tiny/weights.safetensors").write_bytes(b"no weights")
    run = project.doit()
    assert run.code == 1
    assert "cannot be read as weights" in run.out
    assert "skipped: a dependency failed: " in run.out


@pytest.mark.parametrize("jobs", [(), ("-n", "2")], ids=["serial", "parallel"])
def test_a_mistake_that_is_undone_builds_only_its_own_task_again(
    built_tiny: Project, copy_of: Callable[[Project], Project], jobs: tuple[str, ...]
) -> None:
    """doit itself forgets the tasks that it skips, although their files are as they were."""
    project = copy_of(built_tiny)
    weights = project / "models/tiny/weights.safetensors"
    published = (project / "model_repository/tiny/1/model.pt").read_bytes()
    weights.rename(project / "elsewhere")
    run = project.doit(*jobs)
    assert (run.code, run.failed, run.ran) == (1, ["weights:tiny"], [])
    assert (project / "model_repository/tiny/1/model.pt").read_bytes() == published
    (project / "elsewhere").rename(weights)
    plan = project.built("plan").out
    assert plan.count("not built yet") == 1, plan
    assert project.built(*jobs).ran == ["weights:tiny"]
    assert project.built(*jobs).ran == []


@pytest.mark.parametrize(
    ("number", "code", "jobs"),
    [
        pytest.param(signal.SIGINT, 130, [], id="serial, SIGINT"),
        pytest.param(signal.SIGTERM, 143, ["-n", "2"], id="parallel, SIGTERM"),
        pytest.param(signal.SIGTERM, 143, [], id="serial, SIGTERM", marks=pytest.mark.long),
        pytest.param(signal.SIGINT, 130, ["-n", "2"], id="parallel, SIGINT", marks=pytest.mark.long),
    ],
)
def test_an_interrupt_ends_the_run_and_keeps_its_results(
    tiny: Project, number: int, code: int, jobs: list[str]
) -> None:
    process = tiny.start(*jobs)
    output = wait_for(process, "  torchscript  tiny")
    time.sleep(0.5)
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=60)
    run = Run(process.returncode, output + out)
    assert run.code == code, run.out
    assert f"interrupted by {signal.Signals(number).name}; what was finished is kept" in run.out
    assert "Traceback" not in run.out
    assert "weights:tiny" in run.ran
    assert session_ended(process.pid), "no process is left"
    again = tiny.built()
    assert not set(run.ran) & set(again.ran), "what was finished is not built again"


@pytest.mark.parametrize("jobs", [[], pytest.param(["-n", "2"], marks=pytest.mark.long)], ids=["serial", "parallel"])
def test_an_interrupt_while_libraries_are_imported_is_one_line(tiny: Project, jobs: list[str]) -> None:
    process = tiny.start(*jobs)
    output = wait_for(process, "  weights      tiny")
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, _ = process.communicate(timeout=60)
    lines = [line for line in Run(process.returncode, output + out).out.splitlines() if "weights" not in line]
    assert process.returncode == 130
    assert [line for line in lines if "interrupted" in line] == ["interrupted by SIGINT; what was finished is kept"]
    assert len(lines) <= 2, lines  # the other one has the totals
    assert session_ended(process.pid), "no process is left"


def test_a_kill_at_any_moment_leaves_complete_models_and_the_next_run_repairs(
    tiny: Project, built_tiny: Project, request: pytest.FixtureRequest
) -> None:
    kill_storm(tiny, built_tiny, kills=3, seed=1)


@pytest.mark.long
def test_a_long_storm_of_kills(tiny: Project, built_tiny: Project) -> None:
    kill_storm(tiny, built_tiny, kills=60, seed=2)


def kill_storm(project: Project, reference: Project, kills: int, seed: int) -> None:
    """Kill doit with SIGKILL after a random time, each time from a random state of the build."""
    expected = reference.tree()
    generator = random.Random(seed)
    for _ in range(kills):
        process = project.start("-n", generator.choice(["0", "2"]))
        try:
            process.wait(timeout=generator.uniform(0.05, 12))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert session_ended(process.pid), "the stage's child and the fork server end with doit"
        assert_complete(project, expected)
        built = [p for p in (project / "build").rglob("*") if p.is_file() and p.name[0] != "."]
        if built and generator.random() < 0.5:  # the next run has something to build
            generator.choice(built).write_bytes(b"")
    project.built()
    assert project.tree() == expected
    assert os.listdir(project / "build/.scratch") == []


def test_state_is_on_disk_as_soon_as_a_task_succeeds(tiny: Project) -> None:
    process = tiny.start()
    output = wait_for(process, "✓ weights      tiny")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert session_ended(process.pid)
    assert "weights:tiny" in Run(0, output).ran
    assert "weights:tiny" not in tiny.built().ran


def test_a_full_disk_leaves_the_old_targets(built_tiny: Project, copy_of: Callable[[Project], Project]) -> None:
    """A limit on the size of files acts like a full disk: a write fails in the middle."""
    project = copy_of(built_tiny)
    old, published = (project / "build/tiny/model.onnx").read_bytes(), project.tree()
    project.edit("models/tiny/model.toml", "[accuracy]", "[onnx]\nopset = 16\n\n[accuracy]")
    limited = subprocess.run(
        [DOIT],
        cwd=project.root,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert limited.returncode in (1, 2)
    assert "✗ onnx         tiny" in limited.stdout
    assert (project / "build/tiny/model.onnx").read_bytes() == old
    assert project.tree() == published
    project.built()


def test_two_runs_at_once_end_in_one_good_repository(tiny: Project, built_tiny: Project) -> None:
    runs = [tiny.start(), tiny.start()]
    outputs = [process.communicate(timeout=300)[0] for process in runs]
    assert [process.returncode for process in runs] == [0, 0], outputs
    assert tiny.built().ran == []
    assert tiny.tree() == built_tiny.tree()


@pytest.mark.parametrize(
    "jobs",
    [
        pytest.param(["-n", "2"], id="threads"),
        pytest.param(["-n", "2", "-P", "process"], id="processes", marks=pytest.mark.long),
    ],
)
def test_parallel_builds_equal_serial_ones(tiny: Project, built_tiny: Project, jobs: list[str]) -> None:
    tiny.model("other", OTHER)
    tiny.built(*jobs)
    assert {path: data for path, data in tiny.tree().items() if path.startswith("tiny")} == built_tiny.tree()
    assert tiny.built(*jobs).ran == []


def test_build_and_repository_may_be_on_different_file_systems(tiny: Project, built_tiny: Project) -> None:
    """For example if build/ is a cache mount of an image build."""
    repository = Path("/dev/shm") / f"repository-{os.getpid()}"
    if os.stat("/dev/shm").st_dev == os.stat(tiny.root).st_dev:
        pytest.fail("/dev/shm is on the same file system; this machine cannot run the test")
    repository.mkdir()
    try:
        (tiny / "model_repository").symlink_to(repository)
        tiny.built()
        assert tiny.tree() == built_tiny.tree()
        tiny.edit("models/tiny/labels.txt", "class 7\n", "class seven\n")
        assert "publish:tiny" in tiny.built().ran
        assert tiny.built().ran == []
        assert sorted(os.listdir(repository)) == ["tiny", "tiny_onnx"]
    finally:
        subprocess.run(["rm", "-rf", str(repository)], check=True)
