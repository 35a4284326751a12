"""Measures a `doit` with nothing to do, by the number of models, and compares it with other build systems.

this project    N models of 15 tasks each, all up to date. The first run checks every task and remembers each model in
                the no-op cache; later runs only check that its files are unchanged
                (build_tasks/doit_plugin/noop_cache.py). Measured for all models, and for one model by its name.
plain doit      N chains of 7 tasks, from one file to the next, with doit's own md5 checker
ninja, DVC, snakemake
                the same chains, if these programs are on the PATH: pip install ninja dvc snakemake, in an
                environment of their own. DVC is left out above --largest models: its preparation takes too long.

With --against, the same project of an older checkout takes part, and the ratio of this checkout to the older one is
printed.

The models are never built. Their specs are real, but small files replace what the stages would have made, and the
stages write their usual records of them. For a no-op only the number of files and records matters: the digests of large
files are not computed again either.

Every run is a process of its own and is measured by wall-clock time. All sides run in turns. Figures are medians; below
them are the ratios to a `doit` with an empty dodo.py in the same turns. There is no limit for them. The
benchmark ends with an error if a no-op has something to do.

    python benchmarks/incremental.py [--short] [--models 1,100,1000] [--runs N] [--largest N]
                                     [--against PATH [--against-doit PATH]]
"""

import argparse
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from checkouts import (
    DOIT,
    Checkout,
    Side,
    add_options,
    copy_project,
    empty_doit,
    no_op,
    print_ratios,
    requested_checkouts,
    time_in_turns,
    time_no_op,
    timed,
)

SPEC = """\
formats = ["torchscript", "onnx"]
max_batch_size = 8

[architecture]
timm = "resnet18"

[weights]
source = "random://{seed}"

[onnx]
opset = 17

[triton]
instance_group = [{{ count = 2 }}]
dynamic_batching = {{ max_queue_delay_microseconds = 100 }}
"""
CHAIN = ("source", "weights", "model.pt", "model.onnx", "measured", "verdict", "config", "published")
PUBLISHED = ("config.pbtxt", "preprocessing.json", "1/model", "1/provenance.json")
CLIENTS = ("http_client.py", "grpc_client.py", "preprocessing.py", "preprocessing.json")
GOAL = 0.6  # seconds for 1000 models


def main() -> None:
    parser = argparse.ArgumentParser(description="A doit with nothing to do, by the number of models.")
    parser.add_argument("--short", action="store_true", help="1 and 20 models, 3 runs")
    parser.add_argument("--models", type=lambda text: [int(n) for n in text.split(",")], help="1,100,1000")
    parser.add_argument("--runs", type=int, metavar="N", help="of each side (10, short: 3)")
    parser.add_argument("--largest", type=int, default=100, metavar="N", help="largest number of models for DVC (100)")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    add_options(parser)
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.prepare)
        return
    checkouts = requested_checkouts(arguments)
    for count in arguments.models or ([1, 20] if arguments.short else [1, 100, 1000]):
        with tempfile.TemporaryDirectory(prefix="incremental-") as folder:
            measure(checkouts, Path(folder), count, arguments.runs or (3 if arguments.short else 10), arguments.largest)


def measure(checkouts: list[Checkout], folder: Path, count: int, runs: int, largest: int) -> None:
    """Measure all sides with this number of models."""
    print(f"\n{count} models", flush=True)
    empties: list[Side] = []
    all_models: list[Side] = []
    one_model: list[Side] = []
    for checkout in checkouts:
        project = create_project(checkout, folder / checkout.name, count)
        first = time_no_op(checkout, project)
        print(f"  {checkout.name}, first run, which checks every task: {first:.3f} s", flush=True)
        empties.append((f"{checkout.name}, empty dodo.py", empty_doit(checkout, folder)))
        all_models.append((f"{checkout.name}, all models", no_op(checkout, project)))
        one_model.append((f"{checkout.name}, one by name", no_op(checkout, project, "m0000")))
    others: list[Side] = [("plain doit", plain_doit(folder / "doit", count))]
    for name, side in {"ninja": ninja, "snakemake": snakemake, "dvc": dvc}.items():
        if shutil.which(name) is None:
            print(f"  {name} is not on the PATH")
        elif name == "dvc" and count > largest:
            print(f"  {name} is left out above {largest} models")
        else:
            others.append((name, side(folder / name, count)))
    seconds = time_in_turns([*empties, *all_models, *one_model, *others], runs)
    print_ratios(seconds, all_models, empties)
    print_ratios(seconds, one_model, empties)
    for other in others:
        print_ratios(seconds, [other], empties[:1])
    if count == 1000:
        result = "reached" if median(seconds[all_models[0][0]]) <= GOAL else "missed"
        print(f"  goal for {all_models[0][0]}: at most {GOAL} s; {result}")


def create_project(checkout: Checkout, project: Path, count: int) -> Path:
    """A project with this number of models, which doit considers built."""
    copy_project(checkout, project, parts=("build_tasks",))
    for index in range(count):
        folder = project / f"models/m{index:04}"
        folder.mkdir(parents=True)
        (folder / "model.toml").write_text(SPEC.format(seed=index), encoding="utf-8")
    time.sleep(2.1)  # the no-op cache remembers nothing of a project that was edited a moment ago
    # Records differ from version to version, so each checkout writes its own.
    command = [checkout.python, str(checkout.root / "benchmarks/incremental.py"), "--prepare", str(project)]
    subprocess.run(command, check=True)
    return project


def prepare(project: Path) -> None:
    """Run the tasks of all models with stages that write small files; doit records them as successful."""
    os.chdir(project)
    sys.path.insert(0, str(project))
    from unittest.mock import patch

    import msgspec
    from doit.control import TaskControl
    from doit.dependency import Dependency, SqliteDB
    from doit.loader import load_tasks

    import dodo
    from build_tasks.doit_plugin.task_graph import required_tasks
    from build_tasks.runtime import atomic_files
    from build_tasks.runtime.digests import ContentChecker
    from build_tasks.runtime.stage import stage_of

    control = TaskControl(load_tasks(vars(dodo)))
    control.process(dodo.DOIT_CONFIG["default_tasks"])
    records = Dependency(SqliteDB, dodo.DOIT_CONFIG["dep_file"], checker_cls=ContentChecker)
    with patch.object(atomic_files, "flush"):  # for thousands of files, waiting for the disk takes minutes
        for name in required_tasks(control.tasks, control.selected_tasks):
            task = control.tasks[name]
            if stage := stage_of(task):
                files = PUBLISHED if name.startswith("publish:") else CLIENTS
                build = functools.partial(write_small_files, files)
                task.values = msgspec.structs.replace(stage, build=build, in_process=True).run()
                if not isinstance(task.values, dict):  # a failure, in doit's own type
                    sys.exit(f"{name} failed: {task.values.get_msg()}")
                records.save_success(task)
    records.close()


def write_small_files(
    files: Sequence[str], inputs: dict[str, str], outputs: dict[str, str], settings: dict[str, Any]
) -> dict[str, Any]:
    """The `build` of a stage that writes a few bytes in place of every target.

    Args:
        files: What it writes into a target that is a folder: a published model, or its clients.
    """
    for name, path in outputs.items():
        paths = [Path(path, file) for file in files] if name == "folder" else [Path(path)]
        for target in paths:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(f"{target.name}\n", encoding="utf-8")
    return {}


def plain_doit(folder: Path, count: int) -> Callable[[], float]:
    """Write the chains as a dodo.py, and return a function that runs them."""
    write_sources(folder, count)
    steps = "".join(
        f"        yield {{'name': f'{{m}}/{target}', 'file_dep': [f'{{m}}/{source}'], 'targets': [f'{{m}}/{target}'],\n"
        f"               'actions': ['cp %(dependencies)s %(targets)s']}}\n"
        for source, target in itertools.pairwise(CHAIN)
    )
    models = f"(f'm{{index:04}}' for index in range({count}))"
    (folder / "dodo.py").write_text(f"def task_chain():\n    for m in {models}:\n{steps}", encoding="utf-8")
    # Write the files that a run would write: the files of the chain, and doit's records of them.
    for index in range(count):
        for name in CHAIN[1:]:
            shutil.copy(folder / f"m{index:04}/source", folder / f"m{index:04}/{name}")
    subprocess.run([DOIT, "reset-dep"], cwd=folder, check=True, stdout=subprocess.DEVNULL)

    def run() -> float:
        seconds, output = timed([DOIT], folder)
        if re.search(r"^\. ", output, re.MULTILINE):
            sys.exit(f"plain doit should have nothing to do, but its output is:\n{output[-500:]}")
        return seconds

    return run


def ninja(folder: Path, count: int) -> Callable[[], float]:
    """Write the chains as a build.ninja, build them, and return a function that runs them again."""
    write_sources(folder, count)
    steps = "".join(
        f"build m{index:04}/{target}: cp m{index:04}/{source}\n"
        for index in range(count)
        for source, target in itertools.pairwise(CHAIN)
    )
    (folder / "build.ninja").write_text(f"rule cp\n  command = cp $in $out\n{steps}", encoding="utf-8")
    timed(["ninja"], folder)
    return lambda: time_other(["ninja"], folder, "no work to do")


def snakemake(folder: Path, count: int) -> Callable[[], float]:
    """Write the chains as a Snakefile, mark them as built, and return a function that runs them again."""
    write_sources(folder, count)
    last = f"expand('m{{n:04}}/{CHAIN[-1]}', n=range({count}))"
    rules = "".join(
        f"rule r{number}:\n    input: '{{m}}/{source}'\n    output: '{{m}}/{target}'\n"
        "    shell: 'cp {input} {output}'\n"
        for number, (source, target) in enumerate(itertools.pairwise(CHAIN))
    )
    (folder / "Snakefile").write_text(f"rule all:\n    input: {last}\n{rules}", encoding="utf-8")
    for index in range(count):
        for name in CHAIN[1:]:
            shutil.copy(folder / f"m{index:04}/source", folder / f"m{index:04}/{name}")
    command = ["snakemake", "--cores", "1"]
    timed([*command, "--touch"], folder)
    return lambda: time_other(command, folder, "Nothing to be done")


def dvc(folder: Path, count: int) -> Callable[[], float]:
    """Write the chains as a dvc.yaml, build them, and return a function that runs them again."""
    write_sources(folder, count)
    steps = "".join(
        f"  s{index:04}-{number}:\n    cmd: cp m{index:04}/{source} m{index:04}/{target}\n"
        f"    deps: [m{index:04}/{source}]\n    outs: [m{index:04}/{target}]\n"
        for index in range(count)
        for number, (source, target) in enumerate(itertools.pairwise(CHAIN))
    )
    (folder / "dvc.yaml").write_text(f"stages:\n{steps}", encoding="utf-8")
    environment = {"DVC_NO_ANALYTICS": "1"}
    timed(["dvc", "init", "--no-scm", "--quiet"], folder, **environment)
    timed(["dvc", "repro", "--quiet"], folder, **environment)
    return lambda: time_other(["dvc", "repro"], folder, "up to date", **environment)


def write_sources(folder: Path, count: int) -> None:
    """Write the first file of each chain."""
    for index in range(count):
        (folder / f"m{index:04}").mkdir(parents=True)
        (folder / f"m{index:04}/source").write_text(f"{index}\n", encoding="utf-8")


def time_other(command: list[str], folder: Path, expected: str, **environment: str) -> float:
    """Seconds of another build system's run with nothing to do, whose output contains `expected`."""
    seconds, output = timed(command, folder, **environment)
    if expected not in output:
        sys.exit(f"{command[0]} should have nothing to do, but its output is:\n{output[-500:]}")
    return seconds


if __name__ == "__main__":
    main()
