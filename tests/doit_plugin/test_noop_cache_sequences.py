"""Random sequences of doit's commands, edits and damage: a run with the no-op cache answers as one without it.

Each step happens to two copies of a project. In one the cache is removed before every run. The stages are light
(tests/support/light_stages.py), everything else is what users run.
"""

import difflib
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from build_tasks.doit_plugin import noop_cache
from tests.support.project import ENVIRONMENT, ROOT, Project

SPEC = """\
formats = ["torchscript", "onnx"]
max_batch_size = 4
labels = "labels.txt"

[architecture]
timm = "resnet18"

[weights]
source = "random://{seed}"
"""
MODELS = ("a", "b", "c")
TASKS = ("weights:{}", "labels:{}", "reference:{}", "torchscript:{}", "onnx:{}", "measure:{}", "accuracy:{}_onnx",
         "config:{}", "config:{}_onnx", "client:{}", "publish:{}", "publish:{}_onnx", "summary:{}", "{}",
         "prune")  # fmt: skip
FILES = ("build/{}/model.pt", "build/{}/model.onnx", "build/{}/labels.txt", "build/{}/model.pt.measured.json",
         "model_repository/{}/config.pbtxt", "model_repository/{}_onnx/1/model")  # fmt: skip
RUNS = ((), (), (), ("a",), ("b",), ("a", "c"), ("-n", "2"), ("-r", "quiet"), ("publish:b",))
SHORT, LONG, STEPS = 3, 60, 14
TICK = 0.03  # seconds; the digest of a younger file is not cached

Step = tuple[str, ...]


class Pair:
    """Two copies of a project, and the process that runs doit in both."""

    def __init__(self, folder: Path):
        self.cached = Project(folder / "cached")
        with (self.cached / "dodo.py").open("a") as file:
            file.write("\nfrom tests.support.light_stages import replace_builds\n\nreplace_builds(globals())\n")
        self.plain = self.cached.copy(folder / "plain")
        self.reset()
        self.server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/support/doit_server.py")],
            env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.loaded = False  # whether the last run imported dodo.py
        self.hits = 0  # runs that did not

    def reset(self) -> None:
        """Put both projects back to models that are not built."""
        for project in (self.cached, self.plain):
            for name in ("models", "build", "model_repository"):
                shutil.rmtree(project / name, ignore_errors=True)
            (project / "models").mkdir()
            for index, name in enumerate(MODELS):
                project.model(name, SPEC.format(seed=index), labels_txt="cat\ndog\n")

    def doit(self, project: Project, *words: str) -> tuple[int, list[str]]:
        """Exit code and output of one run, without times and durations.

        The order of the lines is random with `-n`, and where a task is requested by name: doit keeps the tasks that
        wait for another one in a set.
        """
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.write(json.dumps([str(project.root), words]) + "\n")
        self.server.stdin.flush()
        code, out, self.loaded = json.loads(self.server.stdout.readline())
        lines = re.sub(r"^\d\d:\d\d:\d\d | +\d+\.\d s|(?<=\.trash/)\w+Z-", "", out, flags=re.MULTILINE).splitlines()
        return code, sorted(lines) if {"-n", "publish:b"} & {*words} else lines

    def apply(self, step: Step) -> None:
        """Do one step in both copies, and compare what doit answers."""
        kind, *words = step
        if kind == "doit":
            time.sleep(TICK)
            (self.plain / noop_cache.CACHE_FILE).unlink(missing_ok=True)
            plan = self.doit(self.cached, "plan", *(word for word in words if word in MODELS))
            expected, found = self.doit(self.plain, *words), self.doit(self.cached, *words)
            difference = "\n".join(
                difflib.unified_diff(expected[1], found[1], "without", "with the cache", lineterm="")
            )
            assert found == expected, f"{difference}\nafter `doit plan` printed {plan[1]}"
            self.hits += not self.loaded
        elif kind in ("forget", "reset-dep", "ignore", "clean"):
            answers = [self.doit(project, kind, *words) for project in (self.cached, self.plain)]
            assert answers[0] == answers[1]
        else:
            for project in (self.cached, self.plain):
                edit(project, kind, *words)


def edit(project: Project, kind: str, path: str) -> None:
    """Change a file of a project, where it exists; or remove or add a model."""
    file = project / path
    if kind == "remove model":
        shutil.rmtree(file, ignore_errors=True)
    elif kind == "add model":
        project.model(file.name, SPEC.format(seed=9), labels_txt="cat\n")
    elif kind == "toggle":
        text = file.read_text() if file.exists() else ""
        file.parent.is_dir() and file.write_text(
            text.replace("= 4", "= 8") if "= 4" in text else text.replace("= 8", "= 4")
        )
    elif file.exists():
        data = file.read_bytes()
        if kind == "append":
            file.write_bytes(data + b"x\n")
        elif kind == "flip":
            file.write_bytes(bytes([data[0] ^ 1]) + data[1:] if data else b"x")
        elif kind == "remove":
            file.unlink()
        else:
            assert kind == "touch"
            file.touch()


def random_step(choose: random.Random) -> Step:
    model = choose.choice(MODELS)
    task, file = choose.choice(TASKS).format(model), choose.choice(FILES).format(model)
    return choose.choices(
        [
            ("doit", *choose.choice(RUNS)),
            (choose.choice(("forget", "reset-dep", "ignore", "clean")), task),
            (choose.choice(("flip", "remove", "touch", "append")), file),
            ("toggle", f"models/{model}/model.toml"),
            (choose.choice(("append", "touch")), f"models/{model}/labels.txt"),
            (choose.choice(("remove model", "add model")), f"models/{MODELS[-1]}"),
        ],
        weights=[12, 6, 3, 1, 1, 1],
    )[0]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    with pair.server:  # closes its input, at whose end it exits
        yield pair


T = "config:a_onnx"
HIGHEST_ROW: list[Step] = [("doit",), ("doit",), ("forget", T), ("doit", "a"), ("doit", "a"), ("doit", "a"), ("doit",)]


@pytest.mark.parametrize("task", ["a", "prune"])
def test_a_group_and_prune_can_be_ignored(pair: Pair, task: str) -> None:
    """These two tasks have no stage, and so no files."""
    for step in [*[("doit",)] * 3, ("ignore", task), ("doit",), ("doit",), ("doit", "a"), ("doit", "a")]:
        pair.apply(step)


@pytest.mark.parametrize("last", ["reset-dep", "ignore"])
def test_sqlite_gives_the_highest_row_number_again(pair: Pair, last: str) -> None:
    """The new record of T has the number of the old one, and the cache sees that its content is another."""
    for step in [*HIGHEST_ROW, ("forget", T), (last, T), ("doit", "a"), ("doit",)]:
        pair.apply(step)
    assert pair.hits >= 2, "the cache was in use"


@pytest.mark.parametrize(
    "count", [pytest.param(SHORT, id="short"), pytest.param(LONG, id="long", marks=pytest.mark.long)]
)
def test_answers_are_those_of_a_run_without_the_cache(pair: Pair, count: int) -> None:
    for seed in range(count):
        choose = random.Random(seed)
        pair.reset()
        steps: list[Step] = [("doit",)] * 3  # the second fills the cache
        try:
            for step in list(steps):
                pair.apply(step)
            for _ in range(STEPS):
                steps.append(random_step(choose))
                pair.apply(steps[-1])
            for step in (("doit",), ("doit",)):
                steps.append(step)
                pair.apply(step)
        except AssertionError as error:
            sequence = "\n".join(" ".join(step) for step in steps)
            raise AssertionError(f"sequence {seed}:\n{sequence}\n\n{error}") from error
    assert pair.hits >= count, "the cache was in use"
