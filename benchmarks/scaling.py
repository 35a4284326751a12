"""Measures how builds of small models scale with `doit -n 2`: one ratio, from builds that alternate on one machine.

clean build  `doit -n 1` over `doit -n 2`, without build/, of 20 models     goal: at least 1.7, on two cores

The models are timm's small test networks with random weights, as model.pt and model.onnx. None of their stages is
large, so the serial part of a build shows, above all the imports of the fork server. Every run is a process of its own
and is measured by wall-clock time; a ratio is one of medians. On a machine that others use too, the seconds of CPU
beside it say more: they show how much the two jobs slow each other down, whoever else runs.

With --against, an older checkout is built in the same turns, and the ratio of this checkout to the older one is printed
for each number of jobs.

A ratio below the goal is no error. The benchmark ends with an error if a build fails, or if the builds of one
checkout differ in any byte of model_repository/.

    python benchmarks/scaling.py [--short] [--runs N] [--jobs N] [--models N] [--against PATH [--against-doit PATH]]
"""

import argparse
import ctypes
import os
import resource
import sys
import tempfile
from pathlib import Path
from statistics import median

from checkouts import (
    REPOSITORY,
    Checkout,
    add_options,
    copy_project,
    read_tree,
    remove_results,
    requested_checkouts,
    timed,
)

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
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER in linux/prctl.h


def main() -> None:
    parser = argparse.ArgumentParser(description="How much faster several jobs build many small models.")
    parser.add_argument("--short", action="store_true", help="2 models, one run of each side, and no goal")
    parser.add_argument("--runs", type=int, metavar="N", default=1, help="builds of each side (1)")
    parser.add_argument("--jobs", type=int, metavar="N", default=2, help="for doit -n, against -n 1 (2)")
    parser.add_argument("--models", type=int, metavar="N", help="(20, short: 2)")
    add_options(parser)
    arguments = parser.parse_args()
    count = arguments.models or (2 if arguments.short else 20)
    checkouts = requested_checkouts(arguments)
    adopt_orphans()
    sides = [(checkout, jobs) for checkout in checkouts for jobs in (1, arguments.jobs)]
    wall: dict[tuple[Checkout, int], list[float]] = {side: [] for side in sides}
    cpu: dict[tuple[Checkout, int], list[float]] = {side: [] for side in sides}
    trees: dict[Checkout, list[dict[str, bytes]]] = {checkout: [] for checkout in checkouts}
    print(f"{count} small models, on {len(os.sched_getaffinity(0))} cores …", flush=True)
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        projects = {
            checkout: project_with_models(checkout, Path(folder) / checkout.name, count) for checkout in checkouts
        }
        for _ in range(arguments.runs):
            for checkout, jobs in sides:
                project = projects[checkout]
                remove_results(project)
                before = cpu_seconds()
                seconds, _ = timed([checkout.doit, "-n", str(jobs), "-r", "quiet"], project)
                wall[checkout, jobs].append(seconds)
                cpu[checkout, jobs].append(cpu_seconds() - before)
                trees[checkout].append(read_tree(project / REPOSITORY))
    for (checkout, jobs), times in wall.items():
        spread, used = f"min {min(times):.1f}, max {max(times):.1f}, runs {len(times)}", median(cpu[checkout, jobs])
        busy = f"{used:.1f} s of CPU, {used / median(times):.2f} cores busy"
        print(f"  {checkout.name}, doit -n {jobs}   median {median(times):6.1f} s   ({spread}; {busy})")
    for checkout in checkouts:
        ratio = median(wall[checkout, 1]) / median(wall[checkout, arguments.jobs])
        result = "" if arguments.short else f"   (goal: at least {GOAL}; {'reached' if ratio >= GOAL else 'below'})"
        print(f"  {checkout.name}: ratio of -n 1 to -n {arguments.jobs}: {ratio:.2f}{result}")
    for jobs in (1, arguments.jobs) if len(checkouts) == 2 else ():
        this, older = (wall[checkout, jobs] for checkout in checkouts)
        print(f"  ratio of this checkout to the older one with -n {jobs}: {median(this) / median(older):.3f}")
    for checkout, (first, *others) in trees.items():
        if not first or any(tree != first for tree in others):
            sys.exit(f"  {checkout.name}: {REPOSITORY}/ differs between the builds, or is empty")
        print(f"  {checkout.name}: {REPOSITORY}/ is byte-identical in all builds: {len(first)} files")


def project_with_models(checkout: Checkout, project: Path, count: int) -> Path:
    """A copy of the checkout's project with this number of small models and no others."""
    copy_project(checkout, project, parts=("build_tasks",))
    for number in range(count):
        folder = project / f"models/small{number:02}"
        folder.mkdir(parents=True)
        (folder / "model.toml").write_text(SPEC.format(network=NETWORKS[number % len(NETWORKS)], seed=number))
    return project


def adopt_orphans() -> None:
    """Become the parent of orphaned descendants.

    The fork server ends after its doit. Its CPU time counts only when this process can wait for it.
    """
    ctypes.CDLL(None).prctl(SUBREAPER, 1)


def cpu_seconds() -> float:
    """Seconds of CPU of all descendants that have ended."""
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
