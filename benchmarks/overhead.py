"""What the build system costs: ratios, each from runs of both sides that alternate on one machine.

no-op        `doit` when nothing is to do for the two shipped models    goal: at most 1.5
             over `doit` with an empty dodo.py in an empty folder
a key        `doit` after a change of [triton], which ends in new config.pbtxt    goal: at most 0.4 s
             over the same
clean build  `doit efficientnet_lite0` without build/                   goal: at most 1.1
             over one Python process that calls the same stages' work in order: no doit, no child processes,
             no fingerprints, no scratch folders (`straight` below)

Every run is a process of its own, and its wall-clock time is taken around it: interpreter and imports included, until
the last child has closed its output. A ratio is one of medians; minimum and maximum stand beside it, since machines are
noisy. Everything happens in copies of dodo.py, build_tasks/ and models/ in a temporary folder, where Python may keep
its bytecode. There efficientnet_b3 gets random weights, since its real ones are a download; for the no-op only the
number and the size of files matter.

The figures are shown, never judged: a ratio above its goal is no error. What ends with an error is a build that fails,
a no-op that builds something, or a doit whose model_repository/ is not the straight program's, byte for byte.

    python benchmarks/overhead.py [--short] [--runs N]
"""

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from build_tasks.formats import artifacts

ROOT = Path(__file__).resolve().parent.parent
DOIT = str(Path(sys.executable).with_name("doit"))

MODEL = "efficientnet_lite0"  # real weights, from a package that is installed
RANDOM_MODEL = "efficientnet_b3"
REPOSITORY = "model_repository"

NO_OP_GOAL, KEY_GOAL, CLEAN_BUILD_GOAL = 1.5, 0.4, 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description="What doit costs over an empty doit, and over a straight script.")
    parser.add_argument("--short", action="store_true", help=f"fewer runs, and small batches of {RANDOM_MODEL}")
    parser.add_argument(
        "--runs", type=int, metavar="N", help="pairs for the no-op (20, short: 5); a quarter for builds"
    )
    parser.add_argument("--straight", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    runs = max(1, arguments.runs or (5 if arguments.short else 20))
    if arguments.straight:
        straight(arguments.straight)
    else:
        print(interpreter(), end="\n\n")
        with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
            no_op(Path(folder), runs, arguments.short)
            print()
            clean_build(Path(folder), max(1, runs // 4))


def interpreter() -> str:
    """Which Python this is: most of what is measured is its start, and one is built to be faster than another."""
    return f"Python {sys.version}"


def no_op(folder: Path, runs: int, short: bool) -> None:
    project, empty = copy_of_project(folder / "no-op"), folder / "empty"
    changes = {"source": '"random://0"', **({"max_batch_size": 2, "batch_size": 2} if short else {})}
    edit(project / f"models/{RANDOM_MODEL}/model.toml", changes)
    empty.mkdir()
    (empty / "dodo.py").touch()
    print(f"no-op: {MODEL}, and {RANDOM_MODEL} with random weights instead of its download; first built …", flush=True)
    timed([DOIT], project)

    def nothing_to_do() -> float:
        seconds, output = timed([DOIT], project)
        if not re.fullmatch(r"\d+ up to date(, \d+ not for this machine)?", output.splitlines()[-1]):
            sys.exit(f"a second doit should have nothing to do, and says:\n{output}")
        return seconds

    nothing = ("doit, empty dodo.py", lambda: timed([DOIT], empty)[0])
    compare(("doit, all up to date", nothing_to_do), nothing, runs, NO_OP_GOAL, warm_up=True)
    print(f"\na key: instance_group of {MODEL} …", flush=True)
    config = project / f"{REPOSITORY}/{MODEL}/config.pbtxt"
    spec = project / f"models/{MODEL}/model.toml"
    unchanged, counts = spec.read_text(encoding="utf-8"), itertools.count(2)

    def key() -> float:
        count = next(counts)
        spec.write_text(f"{unchanged}\n[triton]\ninstance_group = [{{ count = {count} }}]\n", encoding="utf-8")
        seconds, output = timed([DOIT], project)
        if f"count: {count}" not in config.read_text(encoding="utf-8"):
            sys.exit(f"the key should be in {config.name} now, but doit said:\n{output}")
        return seconds

    compare(("doit, [triton] changed", key), nothing, max(1, runs // 2), KEY_GOAL, warm_up=True, in_seconds=True)


def clean_build(folder: Path, runs: int) -> None:
    with_doit, without = copy_of_project(folder / "with-doit"), copy_of_project(folder / "without")
    outputs = []
    print(f"clean build: {MODEL} …", flush=True)

    def by_doit() -> float:
        clear(with_doit)
        seconds, output = timed([DOIT, MODEL], with_doit)
        outputs.append(output)
        return seconds

    def by_hand() -> float:
        clear(without)
        # The fork server's, so that neither the order of sets nor that of sums is a difference between the two.
        command = [sys.executable, __file__, "--straight", str(without)]
        return timed(command, without, PYTHONHASHSEED="0", OPENBLAS_NUM_THREADS="1")[0]

    total = compare((f"doit {MODEL}", by_doit), ("straight script", by_hand), runs, CLEAN_BUILD_GOAL)
    found, expected = tree(with_doit / REPOSITORY), tree(without / REPOSITORY)
    differing = [path for path in sorted(found.keys() | expected.keys()) if found.get(path) != expected.get(path)]
    if differing or not found:
        sys.exit(f"  {REPOSITORY}/ differs between the two: {', '.join(differing) or 'both are empty'}")
    print(f"  {REPOSITORY}/ is byte-identical: {len(found)} files, {sum(map(len, found.values())) / 1e6:.1f} MB")

    print("\nThe last of these builds by doit, as doit reported it:")
    stages = re.findall(r"^✓ (\S+) +(\S+) +(\d+\.\d+) s", outputs[-1], re.MULTILINE)
    for stage, name, seconds in stages:
        print(f"  {stage:<12} {name:<28} {seconds:>6} s")
    outside = total - sum(float(seconds) for _, _, seconds in stages)
    print(f"  {'outside of the stages':<41} {outside:6.1f} s")


def compare(
    ours: tuple[str, Callable[[], float]],
    theirs: tuple[str, Callable[[], float]],
    runs: int,
    goal: float,
    warm_up: bool = False,
    in_seconds: bool = False,
) -> float:
    """Time both in turn and print the ratio of their medians; returns the seconds of our last run.

    in_seconds: the goal is one for our median, not for the ratio.
    """
    sides = (ours, theirs)
    seconds: dict[str, list[float]] = {name: [] for name, _ in sides}
    if warm_up:
        for _, run in sides:
            run()
    for _ in range(runs):
        for name, run in sides:
            seconds[name].append(run())
    for name, found in seconds.items():
        spread = f"min {min(found):.3f}, max {max(found):.3f}, runs {len(found)}"
        print(f"  {name:<24} median {median(found):7.3f} s   ({spread})")
    mine, other = seconds.values()
    ratio = median(mine) / median(other)
    verdict = "reached" if (median(mine) if in_seconds else ratio) <= goal else "above the goal"
    print(f"  {'ratio':<24} {ratio:14.2f}     (goal: at most {goal}{' s' * in_seconds}; {verdict})", flush=True)
    return mine[-1]


def timed(command: list[str], folder: Path, **environment: str) -> tuple[float, str]:
    """Wall-clock seconds of a command, and what it said. A command that fails ends the benchmark."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    run = subprocess.run(
        command,
        cwd=folder,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    seconds = time.perf_counter() - started
    if run.returncode:
        sys.exit(f"{' '.join(command)} failed with exit code {run.returncode}:\n{run.stdout}")
    return seconds, re.sub(r"^\d\d:\d\d:\d\d ", "", run.stdout, flags=re.MULTILINE)  # the time before each line


def copy_of_project(folder: Path, parts: tuple[str, ...] = ("build_tasks", "models")) -> Path:
    for part in parts:
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dodo.py", folder)
    return folder


def edit(spec: Path, changes: dict[str, object]) -> None:
    """Give the first line of each key, whatever its table, another value."""
    text = spec.read_text(encoding="utf-8")
    for key, value in changes.items():
        text, count = re.subn(rf"^{key} = .*", f"{key} = {value}", text, count=1, flags=re.MULTILINE)
        if not count:
            sys.exit(f"{spec}: there is no key {key} to replace")
    spec.write_text(text, encoding="utf-8")


def clear(project: Path) -> None:
    for part in ("build", REPOSITORY):
        shutil.rmtree(project / part, ignore_errors=True)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by path, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def straight(folder: Path) -> None:
    """The work of `doit efficientnet_lite0` in the copy `folder`, as a plain program.

    It asks the stages for their paths and settings, and calls their functions from files to files; nothing of what
    doit or `Stage.run` do around them.
    """
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    from build_tasks.runtime import resources, threads
    from build_tasks.spec.loader import load
    from build_tasks.stages import (
        accuracy,
        client,
        config,
        labels,
        measure,
        onnx,
        precision,
        preprocess,
        publish,
        reference,
        summary,
        torchscript,
        weights,
    )

    def work(task: dict[str, Any]) -> None:
        stage = task["meta"]["stage"]
        elsewhere = {name: path for name, path in stage.external_inputs.items() if path is not None}
        for path in stage.outputs.values():
            os.makedirs(os.path.dirname(path), exist_ok=True)
        stage.build({**stage.inputs, **elsewhere}, stage.outputs, stage.settings)

    threads.limit(int(resources.cores()))
    model = next(model for model in load() if model.name == MODEL)
    work(weights.task(model))
    work(labels.task(model))
    work(reference.task(model))
    work(torchscript.task(model))
    work(onnx.task(model))
    work(precision.task(model, model.spec.engine.precision))
    work(measure.task_of_graph(model, model.spec.engine.precision))
    work(accuracy.task_of_graph(model))
    for model_format in (
        "torchscript",
        "onnx",
    ):  # the plan is compiled where TensorRT and a GPU are, and compared nowhere
        files = model.files(model_format)
        work(measure.task(model, model_format, *files))
        work(accuracy.task(model, model_format, *files))
        work(config.task(model, model_format, files))
        work(client.task(model, model_format, files))
        work(publish.task(model, model_format, files))
    work(preprocess.task(model))
    for model_format in model.ensemble_parts:
        files = artifacts.artifacts_of(model, model_format)
        if model_format == "preprocess":
            work(config.task(model, model_format, files))
        else:
            work(config.ensemble_task(model, files))
            work(client.task(model, model_format, files))
        work(publish.task(model, model_format, files))
    work(summary.task(model))


if __name__ == "__main__":
    main()
