"""What `doit farm` costs: its time over the ideal with 1, 2, 4 and 8 workers, CPU time for a unit, memory of the head.

    python benchmarks/farm.py [--workers 1 2 4 8] [--seconds 20] [--units 2]
    python benchmarks/farm.py --workers --cpu --head 1000

The workers run on this machine. Their stages sleep, so that they do not compete for its cores. The ideal is the sum of
all sleeps divided by the number of workers. Each worker gets the same number of units, so the ideal is the same in each
row: 2 units x 6 stages x 20 s are 4 minutes. A stage of `efficientnet_lite0` took 22 s on average where it was built
(docs/how-to/build-cache.md), and one of a large model takes minutes. With shorter sleeps, the start of the processes
would weigh more than in a real build.

CPU time is that of all processes, with those of Dask: the difference between a farm of many units and one of few, whose
stages do not sleep, by the difference of units. It hardly depends on what else the machine does, as the other times do.

--head builds a farm of many models until some of its units are done, and prints the memory of the head.
"""

import argparse
import contextlib
import ctypes
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.light_stages import use_light_stages  # noqa: E402
from tests.support.project import DOIT, TINY, Project  # noqa: E402

SLEEPING = 6  # stages of one model that a worker runs
SPEC = TINY.replace('labels = "labels.txt"\n', "")
FEW, MANY = 2, 12  # units, for the CPU time of one
PR_SET_CHILD_SUBREAPER = 36  # from linux/prctl.h


def project_of(folder: Path, models: int) -> Project:
    """A project whose models share no step."""
    project = Project(folder)
    use_light_stages(project, processes=True)
    for index in range(models):
        spec = SPEC.replace("max_batch_size = 4", f"max_batch_size = {2 + index}")
        project.model(f"m{index}", spec.replace("weights.safetensors", f"random://{index}"))
    return project


def seconds_of_units(folder: Path, workers: int, models: int, seconds: float) -> float:
    """Return the seconds that the units of a farm take. What the head does after them is not waited for."""
    environment = {**os.environ, "LIGHT_STAGE_SECONDS": str(seconds)}
    with start_farm(project_of(folder, models), workers, **environment) as head:
        assert head.stdout is not None
        lines = []
        for line in head.stdout:
            lines.append(line)
            if found := re.search(r"units took ([\d.]+) s", line):
                head.terminate()
                return float(found[1])
    raise SystemExit("".join(lines))


def cpu_of_farm(folder: Path, models: int) -> float:
    """Return the CPU seconds of all processes of a farm with one worker, whose stages do not sleep."""
    project, before = project_of(folder, models), cpu_of_children()
    with start_farm(project, 1) as head:
        output, _ = head.communicate()
    if head.returncode:
        raise SystemExit(output)
    return cpu_of_children() - before


def start_farm(project: Project, workers: int, **environment: str) -> "subprocess.Popen[str]":
    """Start `doit farm` with workers of this machine."""
    return subprocess.Popen(
        [DOIT, "farm", "--local", str(workers)],
        cwd=project.root,
        env=environment or None,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def cpu_of_children() -> float:
    """CPU seconds of all processes that were started from here and have ended, also by processes that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, 0):  # fork servers end a moment after the doit that started them
            pass
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def memory_of_head(folder: Path, models: int, units: int) -> None:
    """Print the memory of the head of a farm, and of the doit that it ends with."""
    project = project_of(folder, models)
    started = time.monotonic()
    head = start_farm(project, 1)
    assert head.stdout is not None
    done = 0
    for line in head.stdout:
        if f"{models} units" in line:
            print(f"head of {models} models: first unit after {time.monotonic() - started:.0f} s, {peak(head.pid)}")
        done += "✓ onnx" in line
        if done == units:
            print(f"  after {units} units {peak(head.pid)}", flush=True)
            break
    head.terminate()
    head.communicate()
    plan = subprocess.Popen([DOIT, "plan"], cwd=project.root, stdout=subprocess.DEVNULL)
    _, _, usage = os.wait4(plan.pid, 0)
    at_the_end = f"{usage.ru_maxrss * 1024 / 1e6:.0f} MB at most"
    print(f"  `doit plan` of the same models, which is as large as the doit at the end of a farm: {at_the_end}")


def peak(process: int) -> str:
    """The largest memory that a process has had, as text."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found
    return f"{int(found[1]) * 1024 / 1e6:.0f} MB at most"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4, 8], help="none leaves this part out")
    parser.add_argument("--seconds", type=float, default=20.0, help="that each stage sleeps")
    parser.add_argument("--units", type=int, default=2, help="for each worker")
    parser.add_argument("--cpu", action="store_true", help="print the CPU time of a unit")
    parser.add_argument("--head", type=int, default=0, metavar="MODELS", help="print the memory of the head")
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.workers:
            print("workers  units  ideal s  measured s  ideal/measured", flush=True)
        for workers in arguments.workers:
            models, ideal = workers * arguments.units, arguments.units * SLEEPING * arguments.seconds
            measured = seconds_of_units(Path(temporary) / f"w{workers}", workers, models, arguments.seconds)
            print(f"{workers:7}  {models:5}  {ideal:7.1f}  {measured:10.1f}  {ideal / measured:14.2f}", flush=True)
        if arguments.cpu:
            used = [cpu_of_farm(Path(temporary) / f"cpu{models}", models) for models in (FEW, MANY)]
            each = (used[1] - used[0]) / (MANY - FEW)
            print(f"CPU time of a unit of {SLEEPING} stages: {each:.2f} s", flush=True)
        if arguments.head:
            memory_of_head(Path(temporary) / "head", arguments.head, units=MANY)


if __name__ == "__main__":
    main()
