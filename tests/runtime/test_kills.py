"""Kills at system calls chosen at random, while a run publishes, prunes and writes its records: nothing is half.

    strace ─► SIGKILL at the entry of the n-th system call that changes files ─► the repository is looked at ─► next run

An observer reads model_repository/ all the while. The stages write a few bytes, so that a run takes half a second.
"""

import os
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from tests.support.light_stages import use_light_stages
from tests.support.observer import Tree, observed
from tests.support.project import DOIT, ENVIRONMENT, Project, mounted

if shutil.which("strace") is None:
    pytestmark = pytest.mark.skip("needs strace")

# What a run calls to move and remove files. Where the system lacks a call, "?" skips it.
REMOVALS = "?rename,?renameat,?renameat2,?unlink,?unlinkat,?rmdir"
# Also what it calls to create files, to change them, and to lock them.
CALLS = (
    f"{REMOVALS},?mkdir,?mkdirat,?link,?linkat,?symlink,?symlinkat,?chmod,?fchmod,?fchmodat,fsync,fdatasync,flock,"
    "pwrite64,ftruncate"
)
# What doit's records and the caches are written with, and where they are.
RECORD_CALLS = "openat,?unlink,?rename,?renameat2,pwrite64,fsync,fdatasync,ftruncate"
RECORD_FILES = (
    *(f"build/{name}{suffix}" for name in (".doit.sqlite3", ".digests.sqlite3") for suffix in ("", "-journal")),
    "build/.noop_cache",
)
SPEC = """\
formats = [{formats}]

[architecture]
timm = "resnet18"

[weights]
source = "random://{seed}"
"""
State = tuple[int, str]  # a seed, and formats; what the model `net` has at one time
STATES: list[State] = [(seed, formats) for seed in (0, 1) for formats in ('"torchscript", "onnx"', '"torchscript"')]


def set_state(project: Project, state: State) -> None:
    project.model("net", SPEC.format(seed=state[0], formats=state[1]))


def light_project(folder: Path) -> Project:
    project = Project(folder)
    use_light_stages(project)
    project.model("other", SPEC.format(seed=9, formats='"onnx"'))
    return project


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[State, Tree]:
    """What a clean build publishes, by state."""
    project = light_project(tmp_path_factory.mktemp("expected") / "project")
    trees = {}
    for state in STATES:
        shutil.rmtree(project / "build", ignore_errors=True)
        shutil.rmtree(project / "model_repository", ignore_errors=True)
        set_state(project, state)
        project.built()
        trees[state] = project.tree()
    return trees


def killed_run(project: Project, number: int, calls: str = CALLS, files: Sequence[str] = ()) -> bool:
    """Run doit, and kill it at the `number`th of these system calls. Returns whether that was reached.

    Args:
        files: The files that the calls have to be about, if not all calls count.
    """
    inject = f"inject={calls}:signal=KILL:when={number}"
    run = subprocess.run(
        ["strace", "-qq", "-o", "/dev/null", "-e", f"trace={calls}", "-e", inject, *about(project, files), DOIT],
        cwd=project.root, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    assert run.returncode in (0, -9, 137), run.stderr
    return run.returncode != 0


def count_calls(project: Project, calls: str = CALLS, files: Sequence[str] = ()) -> int:
    """How many of these calls a run makes."""
    log = project / "calls"
    subprocess.run(
        ["strace", "-qq", "-o", log, "-e", f"trace={calls}", *about(project, files), DOIT],
        cwd=project.root, env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    return len(log.read_text().splitlines())


def about(project: Project, files: Sequence[str]) -> list[str]:
    """The options of strace that select calls about these files, by the paths that SQLite and this project use."""
    return [word for file in files for path in (file, str(project / file)) for word in ("-P", path)]


def part(tree: Tree, model: str) -> Tree:
    return {path: data for path, data in tree.items() if path.split("/")[0] == model}


def repository_file_system(project: Project, kind: str) -> AbstractContextManager[object]:
    folder = project / "model_repository"
    return nullcontext() if kind == "one file system" else mounted(folder, "-t", "tmpfs", "none")


@pytest.mark.parametrize("kind", ["one file system", "two file systems"])
@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.long)])
def test_a_kill_at_any_system_call_leaves_whole_models(
    tmp_path: Path, expected: dict[State, Tree], kind: str, kills: int
) -> None:
    project, generator = light_project(tmp_path / "project"), random.Random(kills)
    set_state(project, STATES[0])
    trees = list(expected.values())
    with repository_file_system(project, kind):
        calls = count_calls(project)
        with observed(project, lambda name, tree: tree in [part(whole, name) for whole in trees]) as observer:
            killed = 0
            state = STATES[0]
            while killed < kills:
                state = generator.choice([other for other in STATES if other != state])
                set_state(project, state)
                # A run that changes something makes fewer calls than the first one, most of them to publish and prune.
                killed += killed_run(project, generator.randrange(1, calls))
                observer.read()
                if generator.random() < 0.5:
                    continue  # the next kill hits what this one left
                project.built()
                assert project.tree() == expected[state]
                assert os.listdir(project / "build/.scratch") == []
                names = {path.split("/")[0] for path in expected[state]}
                assert set(os.listdir(project / "model_repository")) == names
        project.built()
        assert project.tree() == expected[state]
    assert observer.half == []
    assert observer.reads > kills
    print(f"{kind}: {killed} kills at {calls} system calls, {observer.reads} models read, none of them half")


@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.long)])
def test_a_kill_at_any_write_of_records_and_caches_is_mended(
    tmp_path: Path, expected: dict[State, Tree], kills: int
) -> None:
    project, generator = light_project(tmp_path / "project"), random.Random(kills)
    set_state(project, STATES[0])
    calls = count_calls(project, RECORD_CALLS, RECORD_FILES)
    assert calls > 50
    killed, journals = 0, 0
    state = STATES[0]
    while killed < kills:
        state = generator.choice([other for other in STATES if other != state])
        set_state(project, state)
        killed += killed_run(project, generator.randrange(1, calls), RECORD_CALLS, RECORD_FILES)
        journals += (project / "build/.doit.sqlite3-journal").exists()
        plan = project.built("plan").out
        assert "Traceback" not in plan
        assert ".doit.sqlite3" not in plan
        if generator.random() < 0.5:
            continue  # the next kill hits what this one left
        run = project.built()
        assert "Traceback" not in run.out
        assert ".doit.sqlite3" not in run.out
        assert project.tree() == expected[state]
        assert re.fullmatch(r"\d+ up to date\n", project.built().out)
        assert not list((project / "build").glob(".*.damaged*"))
    project.built()
    assert project.tree() == expected[state]
    print(f"{killed} kills at {calls} system calls, {journals} journals left")


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.long)])
def test_a_kill_while_an_overlays_lower_layer_is_pruned_is_mended(
    tmp_path: Path, expected: dict[State, Tree], step: int
) -> None:
    """There a folder cannot disappear in one step. The next run removes the rest."""
    project = light_project(tmp_path / "project")
    set_state(project, STATES[0])
    project.built()
    (project / "model_repository").rename(tmp_path / "lower")
    set_state(project, STATES[1])
    original = project.copy(tmp_path / "original")
    with mounted(tmp_path / "memory", "-t", "tmpfs", "none") as memory:
        number, reached = 1, True
        while reached:
            shutil.rmtree(project.root)
            original.copy(project.root)
            for name in ("upper", "work"):
                shutil.rmtree(memory / name, ignore_errors=True)
                (memory / name).mkdir()
            layers = f"lowerdir={tmp_path / 'lower'},upperdir={memory / 'upper'},workdir={memory / 'work'}"
            with mounted(project / "model_repository", "-t", "overlay", "overlay", "-o", layers) as repository:
                reached = killed_run(project, number, REMOVALS)
                project.built()
                assert project.tree() == expected[STATES[1]]
                assert sorted(os.listdir(repository)) == ["net", "other_onnx"]
            number += step
    assert number > 10
