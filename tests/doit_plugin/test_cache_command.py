"""`doit cache` and `doit rebuild`: what a cache holds, what it loses, and that a second build has the same bytes."""

import json
import os
import time
from pathlib import Path

import pytest

from build_tasks.doit_plugin.cache_command import parse_size
from tests.support.cache_server import free_port
from tests.support.light_stages import use_light_stages
from tests.support.project import TINY, Project


@pytest.fixture
def light(project: Project, tmp_path: Path) -> tuple[Project, Path, dict[str, str]]:
    """A project with light stages that is built, its cache, and the variable that names it."""
    use_light_stages(project, processes=True)
    project.model("tiny", TINY.replace("weights.safetensors", "random://0"), labels_txt="a\n")
    cache = tmp_path / "cache"
    environment = {"BUILD_CACHE": f"file://{cache}"}
    project.built(**environment)
    return project, cache, environment


def files(cache: Path, kind: str) -> list[Path]:
    return [path for path in (cache / f"v1/{kind}").rglob("*") if path.is_file()]


def age(path: Path, days: float) -> None:
    """Let a file of the cache be older."""
    then = time.time() - days * 86400
    if path.suffix == ".json":
        path.write_text(json.dumps({**json.loads(path.read_text()), "time": then}))
    os.utime(path, (then, then))


def test_show_prune_and_verify(light: tuple[Project, Path, dict[str, str]]) -> None:
    project, cache, environment = light
    results, blobs = len(files(cache, "actions")), len(files(cache, "blobs"))
    out = project.built("cache", **environment).out
    assert f"file://{cache}: {results} results, {blobs} files" in out
    assert f"this checkout: 0 of {results} results were there" in out
    assert "0 damaged" in project.built("cache", "verify", **environment).out
    assert "removed 0 results and 0 files" in project.built("cache", "prune", "--older", "1d", **environment).out
    old = files(cache, "actions")[0]
    outputs = json.loads(old.read_text())["outputs"].values()
    named = {blob["stored"] for output in outputs for blob in output["files"].values()}
    age(old, days=40)
    reading = project.built("cache", "prune", "--older", "30d", **environment, BUILD_CACHE_MODE="read").out
    assert "BUILD_CACHE_MODE=read: not removed 1 results" in reading
    assert old.exists()
    assert "removed 1 results" in project.built("cache", "prune", "--older", "30d", **environment).out
    assert not old.exists()
    kept = json.dumps([json.loads(path.read_text()) for path in files(cache, "actions")])
    assert {path.name for path in files(cache, "blobs")}.isdisjoint(name for name in named if name not in kept)
    assert project.built("cache", "verify", **environment).code == 0
    unnamed = cache / "v1/blobs/00" / ("0" * 64)
    unnamed.parent.mkdir(exist_ok=True)
    unnamed.touch()
    project.built("cache", "prune", **environment)
    assert unnamed.exists(), "another machine may be about to store the result that names it"
    age(unnamed, days=2)
    project.built("cache", "prune", **environment)
    assert not unnamed.exists()
    missing, *_, kept_action = files(cache, "actions")
    missing.write_text("{}")
    assert "1 of the results cannot be read" in project.built("cache", **environment).out
    (blob,) = [path for path in files(cache, "blobs") if path.name in kept_action.read_text()][:1]
    blob.write_bytes(b"?")
    run = project.doit("cache", "verify", **environment)
    assert (run.code, "2 damaged" in run.out, blob.exists()) == (1, True, False), run.out
    assert project.doit("cache", "verify", **environment).code == 0
    project.built("cache", "prune", "--size", "0MB", **environment)
    assert files(cache, "actions") == []


def test_the_clock_of_who_writes_decides_no_age(light: tuple[Project, Path, dict[str, str]]) -> None:
    project, cache, environment = light
    results = files(cache, "actions")
    for index, path in enumerate(results):  # clocks of a year ago and of the next year
        action = json.loads(path.read_text())
        path.write_text(json.dumps({**action, "time": action["time"] + (index % 2 - 0.5) * 2 * 365 * 86400}))
    assert "removed 0 results" in project.built("cache", "prune", "--older", "30 D", **environment).out
    then = time.time() - 40 * 86400
    for path in results:
        os.utime(path, (then, then))
    assert f"removed {len(results)} results" in project.built("cache", "prune", "--older", "30d", **environment).out


@pytest.mark.parametrize(
    ("text", "size"),
    [("50GB", 50e9), ("50 GiB", 50 << 30), ("50g", 50e9), ("0.5t", 5e11), ("500 mb", 5e8), ("8Ki", 8192), ("", None)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: float | None) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["purge"], "expected prune or verify, found 'purge'"),
        (["prune", "--older", "30"], "--older: expected a number of hours, days or weeks"),
        (["prune", "--size", "big"], "--size: expected a size such as 500MB, 50GB or 1TiB, found 'big'"),
        (["prune", "--size", "50"], "--size: expected a size such as 500MB, 50GB or 1TiB, found '50'"),
        (["prune", "--size", "-1GB"], "--size: expected a size such as 500MB, 50GB or 1TiB, found '-1GB'"),
        (["verify", "--size", "1GB"], "--older and --size belong to `doit cache prune`"),
        ([], "BUILD_CACHE is not set"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, project: Project) -> None:
    run = project.doit("cache", *words)
    assert run.code == 3
    assert message in run.out
    assert len(run.out.splitlines()) == 1


def test_a_cache_that_does_not_answer_is_not_an_empty_one(project: Project) -> None:
    run = project.doit("cache", BUILD_CACHE=f"http://127.0.0.1:{free_port()}/cache")
    assert (run.code, len(run.out.splitlines())) == (1, 1), run.out
    assert "Cannot connect" in run.out


def test_a_second_build_is_compared_with_what_is_there(light: tuple[Project, Path, dict[str, str]]) -> None:
    project, _, environment = light
    run = project.built("rebuild", "tiny", **environment)
    assert "targets have the same bytes" in run.out
    assert " fetched (" not in run.out
    assert sorted(path.name for path in (project / "build/.scratch").iterdir()) == []
    # A result that somebody has put into the cache, and that no build gives.
    other = project.copy(project.root.parent / "other")
    (other / "models/tiny/labels.txt").write_text("b\n")
    other.built()
    target = "build/tiny/labels.txt"
    (project / target).write_bytes((other / target).read_bytes())
    run = project.doit("rebuild", "tiny", **environment)
    assert (run.code, "not up to date" in run.out) == (3, True)
    assert project.doit("rebuild", "tniy").out.strip() == (
        "ERROR: expected the name of a model, found 'tniy' (did you mean 'tiny'?)"
    )
