"""The build cache: a second checkout fetches what a first one has built, and no fault of the cache harms a build.

Most tests run the real doit with light stages, each in a process of its own, which write a few bytes.
"""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from build_tasks.runtime import cache_storage, worker
from build_tasks.runtime.build_cache import BuildCache
from build_tasks.runtime.cache_entries import GZIP, Blob, Verifier
from build_tasks.runtime.cache_storage import DamagedError, Storage, StorageError
from tests.support import cache_server, fakes
from tests.support.light_stages import use_light_stages
from tests.support.project import DOIT, TINY, Project, add_tiny, mounted
from tests.support.tiny_network import NETWORK

ENGINES = TINY.replace('["torchscript", "onnx"]', '["torchscript", "tensorrt"]').replace('labels = "labels.txt"\n', "")


@pytest.fixture
def checkout(tmp_path: Path) -> Callable[..., Project]:
    """A function that makes a checkout with light stages, in another folder each time."""

    def make(name: str, *models: str, spec: str = TINY.replace("weights.safetensors", "random://0")) -> Project:
        project = Project(tmp_path / name)
        use_light_stages(project, processes=True)
        for model in models or ("tiny",):
            project.model(model, spec, labels_txt="a\nb\n")
        return project

    return make


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def files(cache: Path, kind: str) -> list[Path]:
    return sorted(path for path in (cache / f"v1/{kind}").rglob("*") if path.is_file())


def in_cache(*paths: Path) -> dict[str, str]:
    return {"BUILD_CACHE": f"file://{paths[0]}"}


def fetched(out: str) -> list[str]:
    return sorted(":".join(line.split()[1:3]) for line in out.splitlines() if "fetched (" in line and "✓" in line)


def warnings(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("! build cache")]


def test_a_second_checkout_fetches_what_the_first_has_built(
    project: Project, tiny_weights: Path, tmp_path: Path, cache: Path
) -> None:
    """With the real stages: the same bytes, without PyTorch, without a process of a stage."""
    add_tiny(project, tiny_weights)
    first = project.built(**in_cache(cache))
    other = Project(tmp_path / "elsewhere")
    add_tiny(other, tiny_weights)
    no_torch = fakes.machine(tmp_path, tensorrt=None, gpus=None, torch=False)
    planned = other.built("plan", **in_cache(cache), **no_torch).out
    other.built("report", **in_cache(cache), **no_torch)
    page = (other / "build/report.html").read_text()
    second = other.built(**in_cache(cache), **no_torch)
    assert second.ran == first.ran
    expected = sorted(
        task for task in first.ran if (project / f"build/tiny/logs/{task.replace(':', '.')}.log").exists()
    )
    assert fetched(second.out) == expected
    assert {"weights:tiny", "reference:tiny", "torchscript:tiny", "onnx:tiny", "summary:tiny"} < {*expected}
    assert sorted(":".join(line.split()[2:4]) for line in planned.splitlines() if "to fetch" in line[:9]) == expected
    in_page = re.findall(r"<title>(\S+): to fetch", page)
    assert sorted(in_page) == expected, "the report knows what `doit` would fetch"
    assert f"{len(expected)} tasks are in the build cache" in page
    assert other.tree() == project.tree()
    assert not (other / "build/tiny/logs").exists()
    assert other.built("plan", **in_cache(cache), **no_torch).out == f"{len(first.ran) + 1} up to date\n"


def test_without_the_variable_nothing_of_the_cache_is_imported(checkout: Callable[..., Project]) -> None:
    project = checkout("light")
    command = [sys.executable, "-X", "importtime", DOIT]
    run = subprocess.run(command, cwd=project.root, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert "build_tasks.runtime.stage" in imported
    modules = {"fsspec", "cached_stage", "build_cache", "cache_entries", "cache_storage"}
    assert imported.isdisjoint({"fsspec", *(f"build_tasks.runtime.{module}" for module in modules)})


KEYS = """\
import hashlib, json, os, sys
sys.path.insert(0, os.getcwd())
import dodo
from doit.loader import load_tasks
from build_tasks.runtime import cached_stage
from build_tasks.runtime.stage import stage_of
def content(path):
    return hashlib.sha256(os.path.basename(path).encode()).hexdigest()
stages = [stage for task in load_tasks(vars(dodo)) if (stage := stage_of(task)) and not stage.in_process]
print(json.dumps({stage.name: cached_stage.key_of_stage(stage, content, {}) for stage in stages}))
"""


def test_models_share_a_step_unless_its_targets_hold_their_name(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    spec = f"{ENGINES}samples = 'samples'\n[engine]\nprecision = 'int8'\ncalibration = 'samples'\n"
    own = spec.replace('timm = "test_efficientnet"', 'network = "network.py:build"\n[input]\nshape = [3, 16, 16]')
    for name in ("one", "two"):
        project.model(name, spec, weights_safetensors="")
        project.model(f"own_{name}", own, network_py=NETWORK.replace("{body}", ""))
        for model in (name, f"own_{name}"):
            (project / f"models/{model}/samples").mkdir()
            (project / f"models/{model}/samples/1.jpg").touch()
            (project / f"models/{model}/weights.safetensors").touch()
    project.model("other", spec.replace("max_batch_size = 4", "max_batch_size = 5"))

    def keys() -> dict[str, str]:
        command = [sys.executable, "-c", KEYS]
        return dict(json.loads(subprocess.run(command, cwd=project.root, capture_output=True, check=True).stdout))

    before = keys()
    pairs = {name: name.replace("two", "one") for name in before if "two" in name}
    different = {name.partition(":")[0] for name, other in pairs.items() if before[name] != before[other]}
    # `measure` of another network's artifact is the same step. Summaries have the name as their title, lock files in
    # their header, and TorchScript in the name of the user's module.
    assert different == {"summary", "compare", "repair", "weights", "reference", "torchscript", "onnx", "precision"}
    assert {name.partition(":")[0] for name in pairs if before[name] != before[pairs[name]] and "own" not in name} == {
        "summary", "compare", "repair",
    }  # fmt: skip
    assert before["torchscript:other"] != before["torchscript:one"]
    assert before["weights:other"] == before["weights:one"]
    project.edit("build_tasks/stages/torchscript.py", '"""torchscript', '"""the torchscript')
    changed = {name for name, key in keys().items() if key != before[name]}
    assert changed == {name for name in before if name.startswith("torchscript:")}


def damage_blob(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "longer":
        path.write_bytes(content * 2)
    elif how == "removed":
        path.unlink()


def damage_action(path: Path, how: str) -> None:
    action = json.loads(path.read_text())
    if how == "another format":
        path.write_text(json.dumps({"outputs": {}}))
    elif how == "half an action":
        path.write_bytes(path.read_bytes()[:100])
    elif how == "outside":
        for output in action["outputs"].values():
            output["files"] = {f"../../../../outside/{name}": blob for name, blob in output["files"].items()}
        path.write_text(json.dumps(action))
    elif how == "another target":
        path.write_text(json.dumps({**action, "outputs": {"other": {"digest": "", "files": {}}}}))


BLOBS = ("flipped", "truncated", "emptied", "longer", "removed")
ACTIONS = ("another format", "half an action", "outside", "another target")


def use_damaged(first: Project, checkout: Callable[..., Project], cache: Path, reported: bool) -> None:
    """A second checkout builds what it cannot fetch, and says so where a blob is damaged; a third one can fetch it."""
    second = checkout("second")
    run = second.built(**in_cache(cache))
    assert fetched(run.out) == []
    assert bool(warnings(run.out)) == reported
    assert second.tree() == first.tree()
    assert not list(cache.parent.rglob("outside"))
    third = checkout("third").built(**in_cache(cache))
    assert warnings(third.out) == []
    assert {"weights:tiny", "torchscript:tiny", "summary:tiny"} < {*fetched(third.out)}


def test_what_is_damaged_is_not_used_and_is_repaired(checkout: Callable[..., Project], cache: Path) -> None:
    """Every kind of damage at once, each in another entry."""
    first = checkout("first")
    first.built(**in_cache(cache))
    actions = sorted(files(cache, "actions"), key=lambda path: path.stat().st_size)  # the larger ones name more blobs
    damaged = actions[: len(ACTIONS)]
    intact = "".join(path.read_text() for path in damaged)
    for path, how in zip(damaged, ACTIONS, strict=True):
        damage_action(path, how)
    blobs = [path for path in files(cache, "blobs") if path.name not in intact]
    assert len(blobs) >= len(BLOBS)
    for index, path in enumerate(blobs):
        damage_blob(path, BLOBS[index % len(BLOBS)])
    use_damaged(first, checkout, cache, reported=True)


@pytest.mark.long
@pytest.mark.parametrize("how", [*BLOBS, *ACTIONS])
def test_each_kind_of_damage(how: str, checkout: Callable[..., Project], cache: Path) -> None:
    first = checkout("first")
    first.built(**in_cache(cache))
    for kind, spoil in (("blobs", damage_blob), ("actions", damage_action)):
        for path in files(cache, kind):
            spoil(path, how)
    use_damaged(first, checkout, cache, reported=how in BLOBS and how != "removed")


def absent() -> Iterator[dict[str, str]]:
    yield {"BUILD_CACHE": "file:///proc/version/cache"}


def no_library() -> Iterator[dict[str, str]]:
    yield {"BUILD_CACHE": "nonsense://cache"}


def refuses() -> Iterator[dict[str, str]]:
    yield {"BUILD_CACHE": f"http://127.0.0.1:{cache_server.free_port()}"}


def never_answers() -> Iterator[dict[str, str]]:
    with cache_server.silent() as port:
        yield {"BUILD_CACHE": f"http://127.0.0.1:{port}"}


@pytest.mark.parametrize("fault", [absent, no_library, refuses, never_answers], ids=lambda fault: str(fault.__name__))
def test_a_cache_that_does_not_work_costs_a_line_and_seconds(
    fault: Callable[[], Iterator[dict[str, str]]], checkout: Callable[..., Project]
) -> None:
    project = checkout("project")
    for environment in fault():
        started = time.monotonic()
        run = project.built(**environment)
        assert len(warnings(run.out)) == 1, run.out
        assert time.monotonic() - started < 30  # without the cache it takes 2 to 4
    assert (project / "model_repository/tiny/1/model").exists()


@pytest.mark.parametrize(
    "fault",
    ["error", "redirects", "another length", "no such host", pytest.param("only headers", marks=pytest.mark.long)],
)
def test_a_faulty_server_is_asked_once_in_a_run(
    fault: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[object] = []
    monkeypatch.setattr(worker, "listener", lambda task, message: lines.append(message))
    with cache_server.over_http(tmp_path, fault) as url:
        client = BuildCache("http://cache.invalid/team" if fault == "no such host" else url, writes=True)
        assert [client.find(f"{index}" * 64, {}) for index in range(10)] == [None] * 10
    (line,) = lines
    assert str(line).startswith("! build cache: http://"), line
    assert str(line).endswith("this run goes on without it"), line


def test_a_server_that_takes_no_files_is_named(tmp_path: Path) -> None:
    with cache_server.over_http(tmp_path) as url, pytest.raises(StorageError, match="can only be read"):
        Storage(url).write("v1/blobs/ab/c", [b"content"])


def test_answers_that_are_all_late_are_not_waited_for_in_each_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[object] = []
    monkeypatch.setattr(worker, "listener", lambda task, message: lines.append(message))
    monkeypatch.setattr(cache_storage, "PROMPT", 0.05)
    monkeypatch.setattr(cache_storage, "MAX_WAITED", 0.5)
    with cache_server.over_http(tmp_path, "late") as url:
        client = BuildCache(url, writes=False)
        assert [client.find(f"{index}" * 64, {}) for index in range(10)] == [None] * 10
    (line,) = lines
    assert "its last answers took" in str(line)


def test_the_folder_of_a_cache_says_who_shares_it(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o2775)
    umask = os.umask(0o077)
    try:
        Storage(f"file://{cache}").write("v1/blobs/ab/c", [b"content"])
    finally:
        os.umask(umask)
    modes = {str(path.relative_to(cache)): f"{path.stat().st_mode & 0o7777:o}" for path in cache.rglob("*")}
    folders = dict.fromkeys(("drafts", "v1", "v1/blobs", "v1/blobs/ab"), "2775")
    assert modes == {**folders, "v1/blobs/ab/c": "664"}


@pytest.mark.parametrize("where", ["full", "read-only"])
def test_a_cache_that_cannot_be_written_costs_a_line(
    where: str, checkout: Callable[..., Project], tmp_path: Path
) -> None:
    options = {"full": "size=16k", "read-only": "size=16m,ro"}[where]
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", options, "tmpfs") as folder:
        run = checkout("project").built(**in_cache(folder))
    (line,) = warnings(run.out)
    assert line.endswith("this run stores nothing more"), line


def test_a_relative_path_is_that_of_the_project_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in ("team cache", "file://team cache", f"file://{tmp_path}/team cache"):
        assert Storage(url).full_url == f"file://{tmp_path}/team cache"
    assert Storage("memory://team").full_url == "memory://team"
    with pytest.raises(StorageError, match="expected a URL, s3://bucket/prefix for example, found 's3:/team'"):
        Storage("s3:/team")


@pytest.mark.parametrize("fault", ["dies", pytest.param("hangs", marks=pytest.mark.long)])
def test_a_server_that_fails_in_the_middle_of_a_file_is_given_up(
    fault: str, checkout: Callable[..., Project], cache: Path
) -> None:
    first = checkout("first")
    first.built(**in_cache(cache))
    second = checkout("second")
    with cache_server.over_http(cache, fault) as url:
        run = second.built(BUILD_CACHE=url, BUILD_CACHE_MODE="read")
    assert warnings(run.out), run.out
    assert second.tree() == first.tree()
    third = checkout("third")
    with cache_server.over_http(cache) as url:
        run = third.built(BUILD_CACHE=url, BUILD_CACHE_MODE="read")
    assert warnings(run.out) == []
    assert "weights:tiny" in fetched(run.out)


def test_who_only_reads_writes_nothing_and_a_wrong_mode_is_refused(
    checkout: Callable[..., Project], cache: Path
) -> None:
    project = checkout("project")
    assert warnings(project.built(**in_cache(cache), BUILD_CACHE_MODE="read").out) == []
    assert not cache.exists()
    run = project.doit(**in_cache(cache), BUILD_CACHE_MODE="raed")
    assert run.code == 3
    assert "BUILD_CACHE_MODE: expected read or write, found 'raed' (did you mean 'read'?)" in run.out


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.long)])
def test_models_come_from_a_bucket(
    count: int, checkout: Callable[..., Project], capsys: pytest.CaptureFixture[str]
) -> None:
    models = [f"m{index}" for index in range(count)]
    seconds = {}
    with cache_server.s3() as environment:
        trees = []
        for name in ("cold", "warm"):
            project = checkout(name, *models)
            started = time.monotonic()
            run = project.built(**environment)
            seconds[name] = time.monotonic() - started
            assert warnings(run.out) == []
            trees.append(project.tree())
        started = time.monotonic()
        assert project.built(**environment).ran == []
        seconds["nothing to do"] = time.monotonic() - started
    assert len(fetched(run.out)) >= 7 * len(models)
    assert trees[0] == trees[1]
    if count > 2:
        with capsys.disabled():
            print(seconds)


def test_a_machine_without_a_gpu_gets_the_plans_that_the_spec_names(
    checkout: Callable[..., Project], tmp_path: Path, cache: Path
) -> None:
    spec = f"{ENGINES}[engine]\ncompute_capabilities = ['8.6', '9.0']\n".replace("weights.safetensors", "random://0")
    without = fakes.machine(tmp_path / "none", tensorrt=None, gpus=None)
    for capability in ("8.6", "9.0"):
        gpu = fakes.machine(tmp_path / capability, gpus=f"GPU of {capability}, {capability}")
        run = checkout(capability, spec=spec).built(**in_cache(cache), **gpu)
        assert "1 not for this machine" not in run.out or capability == "8.6"
    head = checkout("head", spec=spec)
    run = head.built(**in_cache(cache), **without)
    assert {f"{stage}:tiny{suffix}" for stage, suffix in (
        ("engine", ".sm86"), ("engine", ".sm90"), ("measure", "_trt.sm86"), ("measure", "_trt.sm90"),
    )} < {*fetched(run.out)}  # fmt: skip
    assert (head / "model_repository/tiny_trt/1/model").exists()
    actions = [json.loads(path.read_text()) for path in files(cache, "actions")]
    (machine,) = {tuple(a["machine"].keys()) for a in actions if a["stage"] == "engine"}
    assert "driver" in machine
    assert {a["tools"]["GPU"] for a in actions if a["stage"] == "engine"} == {"GPU of 8.6", "GPU of 9.0"}
    # Without the names of kinds nobody asks for another machine's plan.
    plain = checkout("plain", spec=spec.replace("compute_capabilities = ['8.6', '9.0']", ""))
    assert "engine:tiny" not in plain.built(**in_cache(cache), **without).ran


def test_a_large_blob_is_verified_while_it_streams(cache: Path, tmp_path: Path) -> None:
    content = random.Random(0).randbytes(9 << 20)
    sha256 = hashlib.sha256(content).hexdigest()
    blob = Blob(sha256, len(content), sha256, len(content))
    storage = Storage(f"file://{cache}")
    storage.write(blob.path, [content])
    taken: list[bytes] = []

    def read() -> None:
        verifier = Verifier(blob, taken.append)
        storage.stream(blob.path, blob.stored_size, verifier)
        verifier.finish()

    read()
    assert b"".join(taken) == content
    for wrong in (content[:-1] + bytes([content[-1] ^ 1]), content[:-1], content + b"more"):
        (cache / blob.path).write_bytes(wrong)
        with pytest.raises(DamagedError):
            read()


def test_what_unpacks_to_more_than_its_action_says_is_refused(cache: Path) -> None:
    bomb = zlib.compressobj(9, wbits=GZIP)
    content = bomb.compress(bytes(100 << 20)) + bomb.flush()
    blob = Blob("0" * 64, 1000, f"{'0' * 64}.gz", len(content))
    taken: list[bytes] = []
    with pytest.raises(DamagedError, match="more than 1000 bytes"):
        Verifier(blob, taken.append)(content)
    assert taken == []


def write_and_kill(checkout: Callable[..., Project], cache: Path, rounds: int) -> None:
    """Two builds write at once, and one of them is killed; then a third one has to be right."""
    expected = checkout("expected", "one", "two")
    begin = time.monotonic()
    expected.built(**in_cache(cache / "another"))
    duration = time.monotonic() - begin
    generator, kills = random.Random(0), 0
    for number in range(rounds):
        killed, other, last = (checkout(f"{name}{number}", "one", "two") for name in ("killed", "other", "last"))
        processes = [project.start(**in_cache(cache)) for project in (killed, other)]
        time.sleep(generator.uniform(0.1, 1.0) * duration)
        os.killpg(processes[0].pid, signal.SIGKILL)
        for process in processes:
            process.communicate(timeout=120)
        kills += processes[0].returncode != 0
        run = last.built(**in_cache(cache))
        assert warnings(run.out) == [], run.out
        assert last.tree() == expected.tree()
        assert other.tree() == expected.tree()
        assert len(fetched(run.out)) > 10  # of the writer that was not killed
        for path in files(cache, "blobs")[number % 2 :: 2]:
            path.unlink()  # so that the next round writes again
    print(f"{rounds} rounds, {kills} kills")


def test_writers_at_once_and_a_kill_leave_no_wrong_entry(checkout: Callable[..., Project], cache: Path) -> None:
    write_and_kill(checkout, cache, rounds=1)


@pytest.mark.long
def test_writers_and_kills_a_hundred_times(checkout: Callable[..., Project], cache: Path) -> None:
    write_and_kill(checkout, cache, rounds=100)
