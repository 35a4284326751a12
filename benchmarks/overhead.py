"""Measures the overhead of the build system. Every ratio is from runs of both sides that alternate on one machine.

no-op        `doit` with nothing to do for the two shipped models,                            goal: at most 1.5
             over `doit` with an empty dodo.py in an empty folder
changed key  `doit` after a change of [triton], which ends in a new config.pbtxt,             goal: at most 0.4 s
             over the same
clean build  `doit efficientnet_lite0` without build/,                                        goal: at most 1.1
             over one Python process that does the work of the same stages in order: no doit, no child processes,
             no fingerprints, no scratch folders (`build_without_doit` below)

With --against, an older checkout takes part in all three, and the ratio of this checkout to the older one is printed.

Every run is a process of its own. Its wall-clock time includes the start of the interpreter and all imports, and ends
when the last child has closed its output. A ratio is one of medians; minimum and maximum are printed too, because
machines are noisy. Everything happens in copies of dodo.py, build_tasks/ and models/ in a temporary folder, where
Python may keep its bytecode. In the copies efficientnet_b3 gets random weights, because its real ones are a download.
For the no-op only the number and the size of files matter.

A ratio above its goal is printed, but is no error. The benchmark ends with an error if a build fails, if a no-op builds
something, or if the model_repository/ of doit differs in any byte from that of the single process.

    python benchmarks/overhead.py [--short] [--runs N] [--against PATH [--against-doit PATH]]
"""

import argparse
import functools
import itertools
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from checkouts import (
    REPOSITORY,
    Checkout,
    Side,
    add_options,
    copy_project,
    empty_doit,
    no_op,
    print_ratios,
    read_tree,
    remove_results,
    requested_checkouts,
    time_in_turns,
    timed,
)

MODEL = "efficientnet_lite0"  # real weights, from a package that is installed
RANDOM_MODEL = "efficientnet_b3"

NO_OP_GOAL, KEY_GOAL, CLEAN_BUILD_GOAL = 1.5, 0.4, 1.1  # ratio, seconds, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description="What doit costs over an empty doit, and over a single process.")
    parser.add_argument("--short", action="store_true", help=f"fewer runs, and small batches of {RANDOM_MODEL}")
    parser.add_argument(
        "--runs", type=int, metavar="N", help="runs of each side for the no-op (20, short: 5); a quarter for builds"
    )
    parser.add_argument("--without-doit", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    add_options(parser)
    arguments = parser.parse_args()
    runs = max(1, arguments.runs or (5 if arguments.short else 20))
    if arguments.without_doit:
        build_without_doit(arguments.without_doit)
        return
    checkouts = requested_checkouts(arguments)
    print()
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        measure_no_op(checkouts, Path(folder), runs, arguments.short)
        print()
        measure_clean_build(checkouts, Path(folder), max(1, runs // 4))


def measure_no_op(checkouts: list[Checkout], folder: Path, runs: int, short: bool) -> None:
    """Measure a doit with nothing to do, and then a doit after a change of one key."""
    changes = {"source": '"random://0"', **({"max_batch_size": 2, "batch_size": 2} if short else {})}
    no_ops: list[Side] = []
    changed_keys: list[Side] = []
    empties: list[Side] = []
    print(f"no-op: {MODEL}, and {RANDOM_MODEL} with random weights instead of its download; built first …", flush=True)
    for checkout in checkouts:
        project = copy_project(checkout, folder / f"no-op, {checkout.name}")
        edit_spec(project / f"models/{RANDOM_MODEL}/model.toml", changes)
        timed([checkout.doit], project)
        empties.append((f"{checkout.name}, empty dodo.py", empty_doit(checkout, folder)))
        no_ops.append((f"{checkout.name}, nothing to do", no_op(checkout, project)))
        changed_keys.append((f"{checkout.name}, changed key", changed_key(checkout, project)))
    print_ratios(time_in_turns([*no_ops, *empties], runs), no_ops, empties, NO_OP_GOAL)
    print(f"\nchanged key: max_queue_delay_microseconds of {MODEL} …", flush=True)
    seconds = time_in_turns([*changed_keys, *empties], max(1, runs // 2))
    print_ratios(seconds, changed_keys, empties)
    duration = median(seconds[changed_keys[0][0]])
    result = "reached" if duration <= KEY_GOAL else "above the goal"
    print(f"  {changed_keys[0][0]}: {duration:.3f} s   (goal: at most {KEY_GOAL} s; {result})")


def changed_key(checkout: Checkout, project: Path) -> Callable[[], float]:
    """A function that changes the queue delay and returns the seconds until the new configs are published.

    That changes the same files in all versions. `instance_group` would also change the limit of an ensemble's requests,
    which older versions do not have.
    """
    config = project / f"{REPOSITORY}/{MODEL}/config.pbtxt"
    spec = project / f"models/{MODEL}/model.toml"
    unchanged, counts = spec.read_text(encoding="utf-8"), itertools.count(2)

    def run() -> float:
        count = next(counts)
        table = f"[triton.dynamic_batching]\nmax_queue_delay_microseconds = {count}\n"
        spec.write_text(f"{unchanged}\n{table}", encoding="utf-8")
        seconds, output = timed([checkout.doit], project)
        if f"max_queue_delay_microseconds: {count}\n" not in config.read_text(encoding="utf-8"):
            sys.exit(f"{config.name} should contain the delay {count} now, but the output of doit is:\n{output}")
        return seconds

    return run


def measure_clean_build(checkouts: list[Checkout], folder: Path, runs: int) -> None:
    """Measure a build of everything, and compare the published files with those of a single process."""
    this = checkouts[0]
    projects = {checkout.name: copy_project(checkout, folder / f"build, {checkout.name}") for checkout in checkouts}
    without_doit = copy_project(this, folder / "build without doit")
    outputs: list[str] = []
    print(f"clean build: {MODEL} …", flush=True)

    def by_doit(checkout: Checkout) -> float:
        remove_results(projects[checkout.name])
        seconds, output = timed([checkout.doit, MODEL], projects[checkout.name])
        if checkout is this:
            outputs.append(output)
        return seconds

    def by_one_process() -> float:
        remove_results(without_doit)
        # The environment of the fork server, so that neither the order of sets nor of additions differs.
        command = [sys.executable, __file__, "--without-doit", str(without_doit)]
        return timed(command, without_doit, PYTHONHASHSEED="0", OPENBLAS_NUM_THREADS="1")[0]

    builds: list[Side] = [(f"{checkout.name}, doit", functools.partial(by_doit, checkout)) for checkout in checkouts]
    one_process: Side = ("one process", by_one_process)
    seconds = time_in_turns([*builds, one_process], runs, warm_up=False)
    print_ratios(seconds, builds, [one_process] * len(builds), CLEAN_BUILD_GOAL)
    actual, expected = read_tree(projects[this.name] / REPOSITORY), read_tree(without_doit / REPOSITORY)
    differing = [path for path in sorted(actual.keys() | expected.keys()) if actual.get(path) != expected.get(path)]
    if differing or not actual:
        sys.exit(f"  {REPOSITORY}/ differs between the two: {', '.join(differing) or 'both are empty'}")
    print(f"  {REPOSITORY}/ is byte-identical: {len(actual)} files, {sum(map(len, actual.values())) / 1e6:.1f} MB")

    print("\nThe last of these builds by doit, as doit reported it:")
    stages = re.findall(r"^✓ (\S+) +(\S+) +(\d+\.\d+) s", outputs[-1], re.MULTILINE)
    for stage, name, duration in stages:
        print(f"  {stage:<12} {name:<28} {duration:>6} s")
    outside = seconds[builds[0][0]][-1] - sum(float(duration) for _, _, duration in stages)
    print(f"  {'outside of the stages':<41} {outside:6.1f} s")


def edit_spec(spec: Path, changes: dict[str, object]) -> None:
    """Give the first line of each key, in whichever table, another value."""
    text = spec.read_text(encoding="utf-8")
    for key, value in changes.items():
        text, count = re.subn(rf"^{key} = .*", f"{key} = {value}", text, count=1, flags=re.MULTILINE)
        if not count:
            sys.exit(f"{spec}: there is no key {key} to replace")
    spec.write_text(text, encoding="utf-8")


def build_without_doit(folder: Path) -> None:
    """Do the work of `doit efficientnet_lite0` in the copy `folder` as one plain process.

    It takes paths and settings from the stages and calls their functions from files to files. It does none of what doit
    and `Stage.run` add to that.
    """
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    from build_tasks.formats import artifacts, ensemble_steps
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
        external = {name: path for name, path in stage.external_inputs.items() if path is not None}
        for path in stage.outputs.values():
            os.makedirs(os.path.dirname(path), exist_ok=True)
        stage.build({**stage.inputs, **external}, stage.outputs, stage.settings)

    threads.limit(int(resources.cores()))
    model = next(model for model in load() if model.name == MODEL)
    work(weights.task(model))
    for task in labels.tasks(model):
        work(task)
    work(reference.task(model))
    work(torchscript.task(model))
    work(onnx.task(model))
    work(precision.task(model, model.spec.engine.precision))
    work(measure.task_of_graph(model, model.spec.engine.precision))
    work(accuracy.task_of_graph(model))
    # Without the plan: it needs TensorRT and a GPU.
    for model_format in ("torchscript", "onnx"):
        files = model.files(model_format)
        work(measure.task(model, model_format, *files))
        work(accuracy.task(model, model_format, *files))
        work(config.task(model, model_format, files))
        work(client.task(model, model_format, files))
        work(publish.task(model, model_format, files))
    work(preprocess.task(model))
    for model_format in model.ensemble_parts:
        if model_format == "preprocess":
            files = artifacts.artifacts_of(model, model_format)
            work(config.task(model, model_format, files))
            work(publish.task(model, model_format, files))
        else:
            steps = ensemble_steps.steps_of(model, [model])
            work(config.ensemble_task(model, steps))
            work(client.task(model, model_format, ["model.ensemble"]))
            work(publish.ensemble_task(model, steps))
    work(summary.task(model))


if __name__ == "__main__":
    main()
