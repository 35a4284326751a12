"""Kills, crashes, full disks, edits during a build, two builds at once: nothing is lost, nothing is half-written."""

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import add_with_converter, session_ended, wait_for
from tests.support.project import DOIT, OTHER, ROOT, Project, Run


def assert_whole(project: Project, good: dict[str, bytes]) -> None:
    """Each published model is absent, or as a clean build has it."""
    tree = project.tree()
    for name in ("tiny", "tiny_onnx"):
        here = {path: data for path, data in tree.items() if path.split("/")[0] == name}
        assert here in ({}, {path: data for path, data in good.items() if path.split("/")[0] == name})


@pytest.mark.parametrize(
    ("code", "obituary"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "killed by SIGKILL, most likely because memory ran out",
        ),
        ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV"),
        ("import os; os._exit(7)", "ended without a result (exit code 7)"),
        ("raise SystemExit('enough')", "SystemExit: enough"),
    ],
    ids=["out of memory", "segfault", "exit", "SystemExit"],
)
def test_a_crash_is_one_failed_task_and_other_models_are_built(
    project: Project, tiny_weights: Path, code: str, obituary: str
) -> None:
    add_with_converter(project, tiny_weights, code)
    project.model("other", OTHER)
    run = project.doit("-n", "2", "weights:tiny", "weights:other")
    assert run.code == 2
    assert run.failed == ["weights:tiny"]
    assert run.ran == ["weights:other"]
    assert obituary in run.out
    assert "the whole log: build/tiny/logs/weights.tiny.log" in run.out
    assert not (project / "build/tiny/weights.safetensors").exists()


def test_a_task_that_waits_for_a_failed_one_makes_no_crash_of_it(project: Project, tiny_weights: Path) -> None:
    add_with_converter(project, tiny_weights, "pass")
    (project / "models/tiny/weights.safetensors").write_bytes(b"no weights")
    run = project.doit()
    assert run.code == 1
    assert "cannot be read as weights" in run.out
    assert "skipped: a dependency failed: " in run.out


@pytest.mark.parametrize(
    ("number", "code", "jobs"),
    [
        pytest.param(signal.SIGINT, 130, [], id="serial, SIGINT"),
        pytest.param(signal.SIGTERM, 143, ["-n", "2"], id="parallel, SIGTERM"),
        pytest.param(signal.SIGTERM, 143, [], id="serial, SIGTERM", marks=pytest.mark.long),
        pytest.param(signal.SIGINT, 130, ["-n", "2"], id="parallel, SIGINT", marks=pytest.mark.long),
    ],
)
def test_an_interrupt_ends_the_run_in_order(tiny: Project, number: int, code: int, jobs: list[str]) -> None:
    process = tiny.start(*jobs)
    seen = wait_for(process, "  torchscript  tiny")
    time.sleep(0.5)
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=60)
    run = Run(process.returncode, seen + out)
    assert run.code == code, run.out
    assert f"interrupted by {signal.Signals(number).name}; what was finished is kept" in run.out
    assert "Traceback" not in run.out
    assert "weights:tiny" in run.ran
    assert session_ended(process.pid), "no process stays behind"
    again = tiny.built()
    assert not set(run.ran) & set(again.ran), "what was finished is not built again"


def test_a_kill_at_any_moment_leaves_whole_models_and_the_next_run_repairs(
    tiny: Project, built_tiny: Project, request: pytest.FixtureRequest
) -> None:
    kill_storm(tiny, built_tiny, kills=3, seed=1)


@pytest.mark.long
def test_a_long_storm_of_kills(tiny: Project, built_tiny: Project) -> None:
    kill_storm(tiny, built_tiny, kills=60, seed=2)


def kill_storm(project: Project, reference: Project, kills: int, seed: int) -> None:
    """Kill doit with SIGKILL after a random time, each time from a random state of the build."""
    good = reference.tree()
    chance = random.Random(seed)
    for _ in range(kills):
        process = project.start("-n", chance.choice(["0", "2"]))
        try:
            process.wait(timeout=chance.uniform(0.05, 12))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert session_ended(process.pid), "the stage's child and the fork server follow doit"
        assert_whole(project, good)
        built = [p for p in (project / "build").rglob("*") if p.is_file() and p.name[0] != "."]
        if built and chance.random() < 0.5:  # something to build next time
            chance.choice(built).write_bytes(b"")
    project.built()
    assert project.tree() == good
    assert os.listdir(project / "build/.scratch") == []


def test_state_is_on_disk_as_soon_as_a_task_succeeds(tiny: Project) -> None:
    process = tiny.start()
    seen = wait_for(process, "✓ weights      tiny")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert session_ended(process.pid)
    assert "weights:tiny" in Run(0, seen).ran
    assert "weights:tiny" not in tiny.built().ran


def test_a_full_disk_leaves_the_old_targets(built_tiny: Project, copy_of: Callable[[Project], Project]) -> None:
    """A limit on the size of files stands for the full disk: the write fails half-way."""
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


def test_an_input_that_changes_during_the_build_is_not_published(project: Project, tiny_weights: Path) -> None:
    add_with_converter(project, tiny_weights, "open('models/tiny/convert.py', 'a').write('# saved by an editor\\n')")
    run = project.doit("weights:tiny")
    assert run.code == 1
    assert "models/tiny/convert.py changed while being used; nothing was published, run doit again" in run.out
    assert not (project / "build/tiny/weights.safetensors").exists()
    project.edit("models/tiny/convert.py", "open(", "None and open(")
    assert project.built("weights:tiny").ran == ["weights:tiny"]


def test_a_recipe_that_is_edited_during_the_run_is_not_taken_for_the_one_that_ran(
    project: Project, tiny_weights: Path
) -> None:
    add_with_converter(
        project, tiny_weights, "open('build_tasks/stages/reference.py', 'a').write('# saved by an editor\\n')"
    )
    run = project.doit("reference:tiny")
    assert run.code == 1
    assert run.failed == ["reference:tiny"]
    assert "build_tasks.stages.reference was edited since doit started; run doit again" in run.out
    assert project.built("reference:tiny").ran == ["reference:tiny"]


def test_a_users_code_runs_as_it_is_written_whatever_its_mtime(project: Project, tiny_weights: Path) -> None:
    """Python's bytecode cache would trust a file of the same size and second."""
    add_with_converter(project, tiny_weights, "state['classifier.bias'] = state['classifier.bias'] + 1")
    path = project / "models/tiny/convert.py"
    results = []
    for step in ("1", "3"):
        path.write_text(path.read_text().replace("+ 1", f"+ {step}"))
        os.utime(path, (1_600_000_000, 1_600_000_000))
        project.built("weights:tiny", PYTHONDONTWRITEBYTECODE="")
        results.append((project / "build/tiny/weights.safetensors").read_bytes())
    assert results[0] != results[1]


@pytest.mark.parametrize("network", ["net.py", "inner/net.py"])
def test_all_code_of_a_network_is_watched(project: Project, network: str) -> None:
    """Also where the converter stands in the same file, or the file in a folder."""
    code = (
        "from torch import nn\nGAIN = 1.0\n"
        "class Net(nn.Linear):\n    def forward(self, x):\n        return super().forward(x.flatten(1)) * GAIN\n"
        "def build():\n    return Net(48, 4)\ndef convert(state):\n    return state\n"
    )
    converter = '\nconverter = "net.py:convert"' if network == "net.py" else ""
    spec = (
        f'formats = ["torchscript"]\n[architecture]\nnetwork = "{network}:build"\n[input]\nshape = [3, 4, 4]\n'
        f'[weights]\nsource = "random://0"{converter}\n'
    )
    file = project.model("own", spec) / network
    file.parent.mkdir(exist_ok=True)
    file.write_text(code)
    project.built("torchscript:own")
    before = (project / "build/own/model.pt").read_bytes()
    project.edit(f"models/own/{network}", "GAIN = 1.0", "GAIN = 5.5")
    assert "torchscript:own" in project.built("torchscript:own").ran
    assert (project / "build/own/model.pt").read_bytes() != before


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


def test_where_the_tools_are_absent_nothing_is_stale(
    built_tiny: Project, copy_of: Callable[[Project], Project], tmp_path: Path
) -> None:
    """A virtual environment with doit and msgspec alone, as a container for another stage has it."""
    project = copy_of(built_tiny)
    venv.create(tmp_path / "light", with_pip=True)
    pins = re.findall(r"^(?:doit|msgspec)==\S+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert len(pins) == 2
    subprocess.run([tmp_path / "light/bin/pip", "install", "--quiet", *pins], check=True)
    light = [str(tmp_path / "light/bin/doit")]
    run = subprocess.run(light, cwd=project.root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "up to date" in run.stdout
    assert "✓" not in run.stdout
    project.edit("models/tiny/model.toml", "[accuracy]", "[onnx]\nopset = 16\n\n[accuracy]")
    run = subprocess.run(light, cwd=project.root, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "the package torch is not installed here: pip install -r requirements.txt" in run.stdout


def test_build_and_repository_may_be_on_different_file_systems(tiny: Project, built_tiny: Project) -> None:
    """As with build/ as a cache mount of an image build."""
    elsewhere = Path("/dev/shm") / f"repository-{os.getpid()}"
    if os.stat("/dev/shm").st_dev == os.stat(tiny.root).st_dev:
        pytest.fail("/dev/shm is on the same file system; this machine cannot run the test")
    elsewhere.mkdir()
    try:
        (tiny / "model_repository").symlink_to(elsewhere)
        tiny.built()
        assert tiny.tree() == built_tiny.tree()
        tiny.edit("models/tiny/labels.txt", "class 7\n", "class seven\n")
        assert "publish:tiny" in tiny.built().ran
        assert tiny.built().ran == []
        assert sorted(os.listdir(elsewhere)) == ["tiny", "tiny_onnx"]
    finally:
        subprocess.run(["rm", "-rf", str(elsewhere)], check=True)


if sys.platform != "linux":
    pytestmark = pytest.mark.skip("signals, /dev/shm and RLIMIT_FSIZE as Linux has them")


# ---------------------------------------------------------------------------------------------------------------
# Where there is no fork (Windows), and no flock


NO_FORK = """\
import multiprocessing
import sys

multiprocessing.get_all_start_methods = lambda: ["spawn"]
if sys.argv[0].endswith("doit"):  # as files.py finds it on Windows; libraries in children may insist on it
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
    add_with_converter(project, tiny_weights, "import time; open('begun', 'w').close(); time.sleep(600)")
    process = project.start("weights:tiny", **no_fork)
    deadline = time.monotonic() + 120
    while not (project / "begun").exists():
        assert time.monotonic() < deadline, "the converter never began"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert session_ended(process.pid)
