"""The no-op cache: a model in which nothing has changed is not checked again, and every change is noticed."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from build_tasks.doit_plugin import noop_cache, stat_signatures
from build_tasks.doit_plugin.noop_cache import NoopCache, Request, requested_models
from tests.support import fakes, tiny_network
from tests.support.project import DOIT, OTHER, TINY, Project, add_tiny

WITH_ENGINE = TINY.replace('"onnx"]', '"onnx", "tensorrt"]')


@pytest.fixture(scope="module")
def checked_pair(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Project:
    """A project with two models, built."""
    project = Project(tmp_path_factory.mktemp("checked") / "project")
    add_tiny(project, tiny_weights)
    project.model("other", OTHER)
    project.built()
    return project


@pytest.fixture
def pair(checked_pair: Project, copy_of: Callable[[Project], Project]) -> Project:
    project = copy_of(checked_pair)
    fill_cache(project)
    return project


def fill_cache(project: Project) -> None:
    """Run doit with nothing to do. It caches nothing of a project that was edited in the last two seconds."""
    time.sleep(2.1)
    assert project.built().ran == []


def cached(project: Project, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[set[str], set[str]]:
    """Return the models that the next doit would not check, and the unselected ones whose specs it would not read.

    The cache is loaded in the project's folder, with the search path of its doit.
    """
    cache = NoopCache()
    with monkeypatch.context() as patch:
        patch.chdir(project.root)
        patch.setattr("sys.path", [str(project.root), *SEARCH_PATH])
        cache.load(words)
    return set(cache.unchanged), set(cache.unselected)


def search_path() -> list[str]:
    """Return sys.path of the script `doit`, without the project's folder."""
    code = "import sys; print(*sys.path[1:], sep='\\n')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [os.path.dirname(DOIT), *run.stdout.splitlines()]


SEARCH_PATH = search_path()


def test_what_was_found_up_to_date_is_not_judged_again(pair: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cached(pair, monkeypatch) == ({"tiny", "other"}, set())
    assert cached(pair, monkeypatch, "tiny") == ({"tiny"}, {"other"})
    assert pair.built().out == pair.built("publish:tiny", "tiny", "other", "prune").out  # the second checks all


def test_a_model_whose_engine_is_not_for_this_machine_is_cached(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """doit never reads the records of the tasks behind the engine, and the cache has to hold them all the same."""
    tiny_network.add(project, "net", formats='"onnx", "tensorrt"')
    without_tensorrt = fakes.machine(project.root.parent, tensorrt=None, gpus=None)
    project.built(**without_tensorrt)
    time.sleep(2.1)
    assert project.built(**without_tensorrt).ran == []
    libraries = without_tensorrt["PYTHONPATH"].split(os.pathsep)
    monkeypatch.setattr("tests.doit_plugin.test_noop_cache.SEARCH_PATH", [SEARCH_PATH[0], *libraries, *SEARCH_PATH[1:]])
    assert cached(project, monkeypatch) == ({"net"}, set())


def write_and_keep_mtime(path: Path, data: bytes) -> None:
    """Write a file in place, and set its mtime back."""
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    write_and_keep_mtime(path, bytes(data))


EDITS: dict[str, tuple[Callable[[Project], object], str | None]] = {
    "a key": (lambda p: p.edit("models/tiny/model.toml", "= 4", "= 3"), "torchscript:tiny"),
    "a label, its time kept": (lambda p: flip_bit(p / "models/tiny/labels.txt"), "labels:tiny"),
    "a target": (lambda p: flip_bit(p / "build/tiny/model.onnx"), "onnx:tiny"),
    "a missing target": (lambda p: (p / "build/tiny/model.pt.measured.json").unlink(), "measure:tiny"),
    "a published file": (lambda p: flip_bit(p / "model_repository/tiny/1/model.pt"), "publish:tiny"),
    "a file too many": (lambda p: (p / "model_repository/tiny_onnx/1/more").touch(), "publish:tiny_onnx"),
    "a folder that is gone": (lambda p: shutil.rmtree(p / "model_repository/tiny"), "publish:tiny"),
    "forget": (lambda p: p.built("forget", "labels:tiny"), "labels:tiny"),
    "no records": (lambda p: (p / "build/.doit.sqlite3").unlink(), "weights:tiny"),
    "the project's code": (lambda p: p.edit("build_tasks/stages/labels.py", "\n", "\n# \n"), "labels:tiny"),
    "a touched file": (lambda p: os.utime(p / "models/tiny/labels.txt"), None),
    "a file beside the spec": (lambda p: (p / "models/tiny/notes.txt").touch(), None),
}


ALIKE = {"a label, its time kept", "a missing target", "a folder that is gone", "a touched file", "no records"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name in ALIKE)) for name in EDITS])
def test_an_edit_is_seen(pair: Project, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    edit, outdated = EDITS[name]
    edit(pair)
    everything = name in ("no records", "the project's code")
    assert cached(pair, monkeypatch)[0] == (set() if everything else {"other"})
    expected = pair.plan()["to run"]
    run = pair.built()
    assert set(expected) <= set(run.ran)
    assert (outdated in run.ran) if outdated else (run.ran == [])
    fill_cache(pair)
    assert cached(pair, monkeypatch)[0] == {"tiny", "other"}


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # pytest has threads, and doit has none yet
@pytest.mark.parametrize("name", ["tiny", "other"])
def test_an_edit_is_seen_by_two_processes(pair: Project, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The parent checks the first model, and a child the second."""
    monkeypatch.setattr(stat_signatures, "WORTH_A_PROCESS", 2)
    assert cached(pair, monkeypatch)[0] == {"tiny", "other"}
    flip_bit(pair / f"build/{name}/reference.json")
    assert cached(pair, monkeypatch)[0] == {"tiny", "other"} - {name}


def test_the_compiler_is_looked_up_once_for_all_models(pair: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[str] = []
    monkeypatch.setattr(shutil, "which", looked_up.append)
    noop_cache.machine_signature.cache_clear()
    cached(pair, monkeypatch)
    assert looked_up == ["g++"]
    noop_cache.machine_signature.cache_clear()


def test_what_is_ignored_is_reported_in_every_run(pair: Project) -> None:
    pair.built("ignore", "labels:tiny")
    for _ in range(3):
        assert "! labels" in pair.built().out


def test_an_installed_distribution_makes_all_be_judged(pair: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = pair.root.parent / "libraries"
    libraries.mkdir()
    environment = {"PYTHONPATH": str(libraries)}
    assert pair.built(**environment).ran == []
    monkeypatch.setattr(f"{__name__}.SEARCH_PATH", [SEARCH_PATH[0], str(libraries), *SEARCH_PATH[1:]])
    assert cached(pair, monkeypatch)[0] == {"tiny", "other"}
    (libraries / "onnx-99.dist-info").mkdir()
    (libraries / "onnx-99.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: onnx\nVersion: 99\n")
    assert cached(pair, monkeypatch)[0] == set()
    assert any("onnx: " in line and "-> 99" in line for line in pair.built("plan", **environment).out.splitlines())


def test_the_table_at_the_end_has_all_models(pair: Project) -> None:
    pair.edit("models/other/model.toml", "= 2", "= 3")
    out = pair.built().out
    table = out[out.index("─") :]
    *rows, place, sums = table.splitlines()[1:]
    assert [line.split()[0] for line in rows] == ["other", "tiny", "tiny_onnx"]
    assert place.startswith("the models are in model_repository/")
    assert pair.built().out.splitlines()[-1] == f"{sum(int(n) for n in sums.split() if n.isdecimal())} up to date"


def test_the_mistakes_of_other_models_are_reported(pair: Project, tmp_path: Path) -> None:
    pair.model("tiny_onnx", OTHER)
    run = pair.doit("other")
    assert run.code == 3
    assert "format torchscript is served as tiny_onnx, and so is format onnx of models/tiny/model.toml" in run.out
    shutil.rmtree(pair / "models/tiny_onnx")
    pair.edit("models/tiny/model.toml", "formats", "formts")
    assert pair.doit("other").code == 3


def test_a_model_without_a_spec_leaves_the_repository(pair: Project) -> None:
    shutil.rmtree(pair / "models/tiny")
    assert "removing model_repository/tiny:" in pair.built().out
    assert sorted(os.listdir(pair / "model_repository")) == ["other"]


def test_what_is_not_for_this_machine_is_reported_in_every_run(project: Project, tiny_weights: Path) -> None:
    add_tiny(project, tiny_weights)
    (project / "models/tiny/model.toml").write_text(WITH_ENGINE)
    project.built("accuracy:tiny.fp16")
    project.built()
    judged = project.built()
    if "– engine" not in judged.out:
        pytest.skip("this machine has TensorRT and a GPU")
    fill_cache(project)
    assert project.built().out == judged.out
    by_name = project.doit("engine:tiny")
    assert by_name.code == 1, by_name.out


@pytest.mark.parametrize(
    ("words", "request_"),
    [
        ("", Request(set(), quiet=False)),
        ("-n 2 a", Request({"a"}, quiet=False)),
        ("-r quiet a b", Request({"a", "b"}, quiet=True)),
        ("onnx:a", None),
        ("a --always-execute", None),
        ("-a", None),
        ("-r json", None),
        ("c", None),
        ("../models/a", None),
        ("-n", None),
    ],
)
def test_in_use_where_nothing_but_models_is_requested(
    words: str, request_: Request | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"models/{name}").mkdir(parents=True)
        (tmp_path / f"models/{name}/model.toml").touch()
    monkeypatch.chdir(tmp_path)
    assert requested_models(words.split()) == request_
