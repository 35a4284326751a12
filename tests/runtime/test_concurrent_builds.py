"""Several builds at once, beside `clean`, `prune` and an editor: the end is the repository of a clean build.

    doit, doit -n 2, doit net …  ─┐
    doit clean, doit prune       ─┼─► all have ended ─► doit ─► the same files as a clean build
    editor: saves specs by rename ┘

The stages write a few bytes, so that a run takes half a second.
"""

import contextlib
import os
import random
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import light_stages
from tests.support.observer import Tree, observed
from tests.support.project import Project, Run

SPEC = """\
formats = [{formats}]

[architecture]
timm = "resnet18"

[weights]
source = "random://{seed}"
"""
SPECS = [SPEC.format(seed=seed, formats=formats) for seed in (0, 1) for formats in ('"torchscript", "onnx"', '"onnx"')]
BUILDS = ("", "-n 2", "-n 4", "net", "-r json", "publish:other_onnx", "-a net")
OTHERS = ("clean", "clean publish:net_onnx", "clean -c other", "prune", "sweep", "forget net", "plan", "list --status")
# Why a task may fail beside other commands: an input was exchanged, or removed before or while the task read it.
EXPECTED = ("changed while being used", "does not exist; models/", "No such file or directory: 'build/")
State = tuple[str, str | None]  # the specs of `net` and of `guest`, which may be absent


@pytest.fixture(scope="module")
def clean_builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tree]:
    """What clean builds publish for `other`, and for the other models by spec."""
    trees: dict[str, Tree] = {}
    for number, spec in enumerate(SPECS):
        project = light_project(tmp_path_factory.mktemp("clean") / str(number))
        project.model("net", spec)
        project.model("guest", spec)
        project.built()
        trees[spec] = project.tree()
    return trees


def expected_tree(clean_builds: dict[str, Tree], state: State) -> Tree:
    net, guest = state
    return {
        path: data
        for spec, prefixes in ((net, ("net", "other")), (guest, ("guest",)))
        for path, data in (clean_builds[spec] if spec else {}).items()
        if path.startswith(prefixes)
    }


def is_whole(name: str, tree: Tree) -> bool:
    """Whether one stage has written all files of a model: then they hold the same digest."""
    digests = {re.findall(rb"[0-9a-f]{64}", data)[0] for data in tree.values()}
    return len(digests) == 1 and tree.keys() == {f"{name}/{file}" for file in light_stages.FOLDER}


def light_project(folder: Path) -> Project:
    project = Project(folder)
    light_stages.use_light_stages(project)
    project.model("other", SPEC.format(seed=9, formats='"onnx"'))
    return project


class Editor(threading.Thread):
    """Saves the specs of `net` and `guest` again and again, as editors and git do, until `last` is set."""

    def __init__(self, project: Project, seed: int):
        super().__init__(daemon=True)
        self.models = project / "models"
        self.generator = random.Random(seed)
        self.last = threading.Event()
        self.state: State = (SPECS[0], None)

    def run(self) -> None:
        while not self.last.wait(self.generator.uniform(0, 0.2)):
            self.save("net", self.generator.choice(SPECS))
            self.save("guest", self.generator.choice([*SPECS, None]))

    def save(self, model: str, spec: str | None) -> None:
        folder, draft = self.models / model, self.models / f".{model}.new"
        if spec is None:
            if folder.exists():
                folder.rename(draft)
                shutil.rmtree(draft)
        elif not folder.exists():  # as `git checkout` of another branch: first the folder, then the file
            folder.mkdir()
            (folder / "model.toml").write_text(spec)
        else:
            (folder / "model.toml.new").write_text(spec)
            if self.generator.random() < 0.5:
                (folder / "model.toml").rename(folder / "model.toml~")
                time.sleep(0.003)
            (folder / "model.toml.new").rename(folder / "model.toml")
        self.state = (spec or "", self.state[1]) if model == "net" else (self.state[0], spec)


@contextlib.contextmanager
def editing(project: Project, seed: int) -> Iterator[Editor]:
    editor = Editor(project, seed)
    editor.start()
    try:
        yield editor
    finally:
        editor.last.set()
        editor.join()


def run_at_once(project: Project, commands: list[str], generator: random.Random) -> list[Run]:
    """Start doit with each of these arguments, shortly after each other, and return how each ended."""
    processes: list[subprocess.Popen[str]] = []
    for command in commands:
        processes.append(project.start(*command.split()))
        time.sleep(generator.uniform(0, 0.2))
    ends = [process.communicate(timeout=120)[0] for process in processes]
    return [Run(process.returncode, out) for process, out in zip(processes, ends, strict=True)]


@pytest.mark.parametrize("builds", [2, 4])
@pytest.mark.parametrize("rounds", [3, pytest.param(50, marks=pytest.mark.long)])
def test_builds_beside_other_commands_and_an_editor_end_as_a_clean_build(
    tmp_path: Path, clean_builds: dict[str, Tree], builds: int, rounds: int
) -> None:
    project, generator = light_project(tmp_path / "project"), random.Random(100 * rounds + builds)
    project.model("net", SPECS[0])
    codes = []
    with observed(project, is_whole) as observer:
        for number in range(rounds):
            commands = [*generator.choices(BUILDS, k=builds), *generator.choices(OTHERS, k=2)]
            generator.shuffle(commands)
            with editing(project, generator.randrange(1000)) as editor:
                runs = run_at_once(project, commands, generator)
            for command, run in zip(commands, runs, strict=True):
                # 1: an input was built or cleaned meanwhile; 3: a spec was missing at this moment
                assert run.code in (0, 1, 3), (number, command, run.out)
                assert "Traceback" not in run.out, (number, command, run.out)
                failures = [line for line in run.out.splitlines() if line.startswith("✗")]
                unexpected = [line for line in failures if not any(map(line.__contains__, EXPECTED))]
                assert not unexpected, (number, command)
                codes.append(run.code)
            project.built()
            assert project.tree() == expected_tree(clean_builds, editor.state), (number, commands)
            assert project.built().ran == []
            assert os.listdir(project / "build/.scratch") == []
    assert observer.half == []
    assert 0 in codes
    print(f"{rounds} rounds of {builds} builds: exit codes 0, 1, 3: {[codes.count(code) for code in (0, 1, 3)]}, "
          f"{observer.reads} models read")  # fmt: skip


@pytest.mark.parametrize("builds", [2, 4])
def test_builds_at_once_end_as_one_build(tmp_path: Path, clean_builds: dict[str, Tree], builds: int) -> None:
    """Nearly always all succeed. One may fail if another exchanges an input while it is read."""
    project, generator = light_project(tmp_path / "project"), random.Random(builds)
    for spec in SPECS:
        project.model("net", spec)
        runs = run_at_once(project, ["", "-n 2", "-n 4", ""][:builds], generator)
        assert unexpected_failures(runs) == []
        if any(run.code for run in runs):
            project.built()
        assert project.tree() == expected_tree(clean_builds, (spec, None))


def unexpected_failures(runs: list[Run]) -> list[str]:
    """The lines about failed tasks that give no expected reason, and the output of a run that failed without any."""
    lines: list[str] = []
    for run in runs:
        failures = [line for line in run.out.splitlines() if line.startswith("✗")]
        lines += [line for line in failures if not any(map(line.__contains__, EXPECTED))]
        lines += [run.out] if run.code not in ((0, 1) if failures else (0,)) else []
    return lines
