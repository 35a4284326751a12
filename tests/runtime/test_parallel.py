"""`doit -n`: stages share the cores and the memory, and a killed process fails only its own stage."""

import inspect
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from build_tasks.runtime import resources, worker
from build_tasks.runtime.memory_budget import Budget
from tests.support.processes import add_with_converter, session_ended, wait_for
from tests.support.project import Project, Run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs the memory reports of Linux")

# Code for a converter, which runs in the process of the weights stage. {0} is the name of the model, {1} the number of
# models. MEET waits until the converters of all models run, NOTE writes its number of threads to a file, and STAY the
# times when it started and ended.
MEET = (
    "import glob, time; open('arrived.{0}', 'w').close(); "
    "[time.sleep(0.05) for _ in range(2400) if len(glob.glob('arrived.*')) < {1}]"
)
NOTE = "import torch; open('threads.{0}', 'w').write(str(torch.get_num_threads()))"
WRITE_FAULTS = "open('faults.{0}', 'w').write(str(count_page_faults()))"
STAY = (
    "import time; start = time.monotonic(); time.sleep(0.5); "
    "open('span.{0}', 'w').write(f'{{start}} {{time.monotonic()}}')"
)


def stages(project: Project, weights: Path, *lines: str, models: int = 2) -> list[str]:
    """Add models whose converters execute these lines; returns their weights tasks."""
    names = ["abcdefgh"[index] for index in range(models)]
    for name in names:
        code = "\n    ".join(line.format(name, models) for line in lines)
        add_with_converter(project, weights, code, name)
    return [f"weights:{name}" for name in names]


def written(project: Project, name: str) -> list[str]:
    """What the converters wrote to files of this name, in the order of the models."""
    return [path.read_text() for path in sorted(project.root.glob(f"{name}.*"))]


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_cores_are_shared(project: Project, tiny_weights: Path, jobs: int) -> None:
    tasks = stages(project, tiny_weights, MEET, NOTE, models=jobs)
    project.built("-n", str(jobs), *tasks, OMP_NUM_THREADS="64")
    assert written(project, "threads") == [str(max(1, int(resources.cores() / jobs)))] * jobs


def test_omp_num_threads_is_an_upper_bound(project: Project, tiny_weights: Path) -> None:
    project.built(*stages(project, tiny_weights, NOTE, models=1), OMP_NUM_THREADS="1")
    assert written(project, "threads") == ["1"]


def count_page_faults() -> int:
    """Page faults of this process while it fills and frees 50 MB twenty times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        len(b"x" * 50_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_stage_keeps_the_memory_that_it_frees(project: Project, tiny_weights: Path, tmp_path: Path) -> None:
    code = textwrap.indent(inspect.getsource(count_page_faults), "    ").lstrip()
    project.built(*stages(project, tiny_weights, "import resource", code, WRITE_FAULTS, models=1))
    (faults,) = map(int, written(project, "faults"))
    # `doit bench` measures what a server would need, whose memory is new each time.
    assert 5 * faults < worker.call(count_page_faults, log=str(tmp_path / "log"))


def test_figures_do_not_depend_on_the_cores(tiny: Project, built_tiny: Project) -> None:
    """Although the answers of PyTorch and ONNX Runtime do."""
    tiny.built(OMP_NUM_THREADS="3" if os.environ.get("OMP_NUM_THREADS") == "1" else "1")
    for file in ("reference.json", "model.pt.measured.json", "model.onnx.measured.json"):
        assert (tiny / f"build/tiny/{file}").read_bytes() == (built_tiny / f"build/tiny/{file}").read_bytes()


def most_at_once(project: Project) -> int:
    """The largest number of stages that ran at the same time."""
    spans = [tuple(map(float, text.split())) for text in written(project, "span")]
    return max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)


@pytest.mark.parametrize(("memory", "together"), [("0.01", 1), ("0.7", 2), ("100", 3)])
def test_no_more_run_at_once_than_fit(project: Project, tiny_weights: Path, memory: str, together: int) -> None:
    """Two fit into 0.7 GB. None fits into 10 MB, and then one runs alone."""
    tasks = stages(project, tiny_weights, *([MEET] if together == 3 else []), STAY, models=3)
    run = project.built("-n", "3", *tasks, BUILD_MEMORY=memory)
    assert most_at_once(project) == together
    assert ("waits for memory" in run.out) is (together < 3)


def test_requests_for_memory_are_served_in_their_order() -> None:
    """A large request between small ones is not delayed for ever. It runs alone."""
    budget, order = Budget(10), list[str]()

    def stage(name: str, need: int) -> None:
        with budget.reserve(need, lambda: None):
            order.append(name)
            time.sleep(0.05)

    with budget.reserve(5, lambda: None):
        threads = []
        for name, need in (("small", 5), ("large", 99), ("later", 1)):
            threads.append(threading.Thread(target=stage, args=(name, need)))
            threads[-1].start()
            time.sleep(0.02)
    for thread in threads:
        thread.join(timeout=10)
    assert order == ["small", "large", "later"]
    with budget.reserve(10, lambda: pytest.fail("all of it is free again")):
        pass


@pytest.mark.parametrize("memory", ["much", "-1", "nan", ""])
def test_a_budget_that_is_no_positive_number_is_an_error(project: Project, memory: str) -> None:
    project.model("tiny")
    run = project.doit("list", BUILD_MEMORY=memory)
    assert run.code == 3
    assert run.out.splitlines()[-1].endswith(f"BUILD_MEMORY: expected a number of GB, found {memory!r}")


def test_an_interrupt_ends_a_stage_that_waits_for_memory(project: Project, tiny_weights: Path) -> None:
    tasks = stages(project, tiny_weights, "import time; time.sleep(600)")
    process = project.start("-n", "2", *tasks, BUILD_MEMORY="0.01")
    wait_for(process, "waits for memory")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert session_ended(process.pid)


@pytest.mark.parametrize(
    ("victim", "failed", "message"),
    [
        ("os.getpid()", ["weights:a"], "killed by SIGKILL"),
        (
            "os.getppid()",
            ["weights:a", "weights:b"],
            "the fork server, which the stage's process came from, was killed",
        ),
    ],
    ids=["a child", "the fork server"],
)
def test_a_kill_fails_only_the_stages_of_the_killed_process(
    project: Project, tiny_weights: Path, victim: str, failed: list[str], message: str
) -> None:
    """Two stages run. b waits until a was killed; c and d start later."""
    tasks = stages(project, tiny_weights, "pass", models=4)
    kill = f"import os, signal, time; time.sleep(0.5); os.kill({victim}, signal.SIGKILL); time.sleep(600)"
    add_with_converter(project, tiny_weights, f"{MEET.format('a', 2)}; {kill}", "a")
    add_with_converter(project, tiny_weights, f"{MEET.format('b', 2)}; time.sleep(3)", "b")
    process = project.start("-n", "2", *tasks)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 2, out
    run = Run(process.returncode, out)
    assert (run.failed, run.ran) == (failed, [task for task in tasks if task not in failed])
    assert out.count(message) == len(failed), out
    assert session_ended(process.pid)


CALLS = """\
import multiprocessing.forkserver
import os
import signal
import sys

from build_tasks.runtime import worker


def double(number):
    return 2 * number


def kill_the_server():
    os.kill(multiprocessing.forkserver._forkserver._forkserver_pid, signal.SIGKILL)


if __name__ == "__main__":
    worker.STAGE_MODULES[:] = sys.argv[1:]
    print(worker.call(double, 21, log="logs/call.log"))
    kill_the_server()
    print(worker.call(double, 4, log="logs/call.log"))
"""


def calls(project: Project, *preload: str) -> "subprocess.CompletedProcess[str]":
    (project / "calls.py").write_text(CALLS)
    command = [sys.executable, "calls.py", *preload]
    return subprocess.run(command, cwd=project.root, capture_output=True, text=True, check=False, timeout=60)


def test_a_fork_server_that_was_killed_is_started_again(project: Project) -> None:
    assert calls(project).stdout.split() == ["42", "8"]


def test_a_fork_server_that_is_killed_while_it_starts_is_started_again(project: Project) -> None:
    (project / "once.py").write_text(
        "import os\nif not os.path.exists('started'): open('started', 'w'); os.kill(os.getpid(), 9)\n"
    )
    assert calls(project, "once").stdout.split() == ["42", "8"]


def test_a_fork_server_that_never_starts_is_an_error(project: Project) -> None:
    (project / "never.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    assert (
        "CrashError: the fork server, which stages' processes come from, is killed again and again"
        in calls(project, "never").stderr
    )
