"""How `doit -n 2` scales: one ratio, from builds of many small models that alternate on one machine.

clean build  `doit -n 1` over `doit -n 2`, without build/, of 20 models     goal: at least 1.7, on two cores

The models are timm's small test networks with random weights, as model.pt and model.onnx: no stage of theirs is large,
so what is serial shows, the fork server's import first of all. Every run is a process of its own, and its wall-clock
time is taken around it; a ratio is one of medians. On a machine that others use too, the seconds of CPU beside it tell
more: what the two spend, and so what the workers take from each other, does not depend on who else runs.

The figures are shown, never judged. What ends with an error is a build that fails, or a model_repository/ that is not
the same for both, byte for byte.

    python benchmarks/scaling.py [--short] [--runs N] [--jobs N] [--models N]
"""

import argparse
import ctypes
import os
import resource
import sys
import tempfile
from pathlib import Path
from statistics import median

from overhead import DOIT, REPOSITORY, clear, copy_of_project, timed, tree

NETWORKS = (
    "test_efficientnet", "test_resnet", "test_vit", "test_convnext", "test_byobnet", "test_mambaout", "test_nfnet",
    "test_efficientnet_gn", "test_efficientnet_ln", "test_efficientnet_evos",
)  # fmt: skip
SPEC = """\
formats = ["torchscript", "onnx"]
max_batch_size = 4

[architecture]
timm = "{network}"

[weights]
source = "random://{seed}"
"""
GOAL = 1.7
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER, of linux/prctl.h


def main() -> None:
    parser = argparse.ArgumentParser(description="How much faster many small models are built by several jobs.")
    parser.add_argument("--short", action="store_true", help="2 models, a run of each side, and no goal")
    parser.add_argument("--runs", type=int, metavar="N", default=1, help="pairs of builds (1)")
    parser.add_argument("--jobs", type=int, metavar="N", default=2, help="for doit -n, against -n 1 (2)")
    parser.add_argument("--models", type=int, metavar="N", help="(20, short: 2)")
    arguments = parser.parse_args()
    count = arguments.models or (2 if arguments.short else 20)
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        project = with_models(Path(folder) / "project", count)
        wall: dict[int, list[float]] = {1: [], arguments.jobs: []}
        cpu: dict[int, list[float]] = {jobs: [] for jobs in wall}
        built = []
        print(f"{count} small models, on {len(os.sched_getaffinity(0))} cores …", flush=True)
        for _ in range(arguments.runs):
            for jobs in wall:
                clear(project)
                before = seconds_of_cpu()
                wall[jobs].append(timed([DOIT, "-n", str(jobs), "-r", "quiet"], project)[0])
                cpu[jobs].append(seconds_of_cpu() - before)
                built.append(tree(project / REPOSITORY))
    for jobs, seconds in wall.items():
        spread, used = f"min {min(seconds):.1f}, max {max(seconds):.1f}, runs {len(seconds)}", median(cpu[jobs])
        busy = f"{used:.1f} s of CPU, {used / median(seconds):.2f} cores busy"
        print(f"  doit -n {jobs}   median {median(seconds):6.1f} s   ({spread}; {busy})")
    ratio = median(wall[1]) / median(wall[arguments.jobs])
    verdict = "" if arguments.short else f"(goal: at least {GOAL}; {'reached' if ratio >= GOAL else 'below the goal'})"
    print(f"  ratio       {ratio:13.2f}     {verdict}".rstrip())
    if not built[0] or any(one != built[0] for one in built):
        sys.exit(f"  {REPOSITORY}/ differs between the builds, or is empty")
    print(f"  {REPOSITORY}/ is byte-identical: {len(built[0])} files")


def with_models(project: Path, count: int) -> Path:
    """A copy of the project in which Python may keep its bytecode, with so many models and no others."""
    copy_of_project(project, parts=("build_tasks",))
    for number in range(count):
        folder = project / f"models/small{number:02}"
        folder.mkdir(parents=True)
        (folder / "model.toml").write_text(SPEC.format(network=NETWORKS[number % len(NETWORKS)], seed=number))
    return project


def adopt_orphans() -> None:
    """Let the fork server, which ends after its doit, be a child of this process: its CPU time counts once it ends."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1)


def seconds_of_cpu() -> float:
    """Of all descendants that have ended."""
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
