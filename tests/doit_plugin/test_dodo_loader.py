"""The loader of dodo.py makes the tasks that doit's own makes, in the same order, and little is imported for that."""

import inspect
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from doit.cmd_base import NamespaceTaskLoader

from build_tasks.doit_plugin.dodo_loader import DodoLoader
from build_tasks.doit_plugin.reserved_names import COMMANDS, STAGES
from tests.support.project import Project


def task_second() -> Iterator[dict[str, Any]]:
    """Two tasks, and a task of another name"""
    yield {"basename": "group", "actions": None, "task_dep": ["second:b"], "doc": "of its own"}
    yield {"name": "b", "actions": ["echo b"], "targets": ["b"]}
    yield {"name": "a", "actions": ["echo a"], "file_dep": ["b"]}


def task_first() -> dict[str, Any]:
    """One task"""
    return {"actions": ["echo"]}


def task_nothing() -> Iterator[dict[str, Any]]:
    """An empty group"""
    yield from ()


NAMESPACE = {
    name: value
    for name, value in sorted({**globals(), "task_dep": ["no creator"], "DOIT_CONFIG": {}}.items())
    if "task" in name.lower() or name == "DOIT_CONFIG"
}


def listed(loader: Any) -> list[Any]:
    loader.namespace = NAMESPACE
    loader.config = {"task:second:a": {"verbosity": 2}}
    tasks = loader.load_tasks(SimpleNamespace(execute_tasks=True), [])
    shown = ("name", "doc", "subtask_of", "has_subtask", "task_dep", "file_dep", "targets", "cfg_values")
    return [[getattr(task, field) for field in shown] for task in tasks]


def test_the_tasks_are_those_of_doits_own_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = listed(NamespaceTaskLoader())
    monkeypatch.setattr(inspect, "getsourcelines", lambda creator: pytest.fail(f"the source of {creator} is read"))
    found = listed(DodoLoader(NamespaceTaskLoader()))
    assert found == expected
    assert [name for name, *_ in found] == ["group", "second", "second:b", "second:a", "first", "nothing"]
    assert found[3][-1] == {"verbosity": 2}


def test_no_stage_has_the_name_of_a_command() -> None:
    """doit's loader refuses such a name in every run; here it is enough to look once."""
    assert not {*STAGES} & {*COMMANDS}


# The modules of formats/ that every run of a model imports, because tasks are declared with them.
DECLARING = {
    *("artifacts", "declarations", "ensemble_steps", "label_file", "layer_errors", "lock_file", "reduced_precision"),
    *("serving_device", "user_code", "weight_sources"),
}
SPEC = """\
ensemble = "onnx"
labels = "imagenet-1k"
[architecture]
timm = "test_efficientnet"
[weights]
source = "random://0"
[engine]
precision = "int8"
"""
DECLARE = """\
import os, sys
sys.path.insert(0, os.getcwd())
from build_tasks.doit_plugin.noop_cache import noop_cache
noop_cache.load(set())
import dodo
from doit.loader import load_tasks
assert len(load_tasks(vars(dodo))) > 20
print(*sys.modules)
"""


def test_tasks_are_declared_without_the_modules_that_build_them(project: Project) -> None:
    """Otherwise each run after a changed key pays for their import: a stage imports in `build` what only that needs."""
    project.model("spec", SPEC)
    run = subprocess.run(
        [sys.executable, "-c", DECLARE], cwd=project.root, stdout=subprocess.PIPE, text=True, check=True
    )
    loaded = set(run.stdout.split())
    prefix = "build_tasks.formats."
    assert {name.removeprefix(prefix) for name in loaded if name.startswith(prefix)} == DECLARING
    assert not loaded & {"torch", "numpy", "onnx", "jinja2", "statistics", "rich", "matplotlib"}
