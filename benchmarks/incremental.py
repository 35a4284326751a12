"""What a doit with nothing to do costs, by the number of models, beside other build systems.

this project    N models of 15 tasks each, all up to date: the first run judges every task and remembers each model as
                a whole, later ones look whether its files are as they were
                (build_tasks/doit_plugin/noop_cache.py); one by its name
plain doit      N chains of 7 tasks, a file to a file each, with doit's own md5 checker
ninja, DVC, snakemake
                the same chains, where they are on the PATH: pip install ninja dvc snakemake, in an environment of their
                own; a side whose chains take longer to make than anybody waits for is left out above --largest

The models are never built: their specs are real, and what stages would have made are small files, with the records that
the stages themselves would have written. For a no-op only the number of files and records matters, and with big files
their digests are not computed again either.

Every run is a process of its own, and the wall-clock time is taken around it. The sides run in turns; figures are
medians, and each stands beside that of a `doit` with an empty dodo.py from the same turns. They are shown, never
judged. What ends with an error is a no-op that has something to do.

    python benchmarks/incremental.py [--short] [--models 1,100,1000] [--runs N] [--largest N]
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

from overhead import DOIT, copy_of_project, interpreter, timed

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
GOAL = 0.6  # seconds, of 1000 models

Side = tuple[str, Callable[[], float]]


def main() -> None:
    parser = argparse.ArgumentParser(description="A doit with nothing to do, by the number of models.")
    parser.add_argument("--short", action="store_true", help="1 and 20 models, 3 runs")
    parser.add_argument("--models", type=lambda text: [int(n) for n in text.split(",")], help="1,100,1000")
    parser.add_argument("--runs", type=int, metavar="N", help="of each side (10, short: 3)")
    parser.add_argument("--largest", type=int, default=100, metavar="N", help="models, of DVC (100)")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.prepare)
        return
    print(interpreter())
    for count in arguments.models or ([1, 20] if arguments.short else [1, 100, 1000]):
        with tempfile.TemporaryDirectory(prefix="incremental-") as folder:
            measure(Path(folder), count, arguments.runs or (3 if arguments.short else 10), arguments.largest)


def measure(folder: Path, count: int, runs: int, largest: int) -> None:
    project = made(folder / "project", count)
    started = time.perf_counter()
    nothing_to_do(project)
    print(
        f"\n{count} models\n  this project, judging all      {time.perf_counter() - started:8.3f} s   (once)",
        flush=True,
    )
    empty = folder / "empty"
    empty.mkdir()
    (empty / "dodo.py").touch()
    sides: list[Side] = [
        ("doit, empty dodo.py", lambda: timed([DOIT], empty)[0]),
        ("this project", lambda: nothing_to_do(project)),
        ("this project, one by name", lambda: nothing_to_do(project, "m0000")),
        ("plain doit", plain_doit(folder / "doit", count)),
    ]
    others = {"ninja": ninja, "snakemake": snakemake, "dvc": dvc}
    for name, side in others.items():
        if shutil.which(name) is None:
            print(f"  {name:<28} not on the PATH")
        elif name == "dvc" and count > largest:
            print(f"  {name:<28} left out above {largest} models")
        else:
            sides.append((name, side(folder / name, count)))
    seconds: dict[str, list[float]] = {name: [] for name, _ in sides}
    for _, run in sides:
        run()
    for _ in range(runs):
        for name, run in sides:
            seconds[name].append(run())
    base = median(seconds["doit, empty dodo.py"])
    for name, found in seconds.items():
        spread = f"min {min(found):.3f}, max {max(found):.3f}, runs {len(found)}"
        ratio = median(found) / base
        print(f"  {name:<28} median {median(found):8.3f} s   {ratio:7.2f} x an empty doit   ({spread})", flush=True)
    if count == 1000:
        verdict = "reached" if median(seconds["this project"]) <= GOAL else "missed"
        print(f"  goal: at most {GOAL} s; {verdict}")


def nothing_to_do(project: Path, *words: str) -> float:
    seconds, output = timed([DOIT, *words], project)
    if not re.fullmatch(r"\d+ up to date", output.splitlines()[-1]):
        sys.exit(f"doit should have nothing to do, and says:\n{output[-2000:]}")
    return seconds


def made(project: Path, count: int) -> Path:
    """A project of that many models, all of which doit takes for built."""
    copy_of_project(project, parts=("build_tasks",))
    for index in range(count):
        folder = project / f"models/m{index:04}"
        folder.mkdir(parents=True)
        (folder / "model.toml").write_text(SPEC.format(seed=index), encoding="utf-8")
    time.sleep(2.1)  # of a project that was edited a moment ago nothing is remembered
    subprocess.run([sys.executable, __file__, "--prepare", str(project)], check=True)
    return project


def prepare(project: Path) -> None:
    """Small files in the place of all targets, and the records of stages that made them."""
    os.chdir(project)
    sys.path.insert(0, str(project))
    from doit.control import TaskControl
    from doit.dependency import Dependency, SqliteDB
    from doit.loader import load_tasks

    import dodo
    from build_tasks.doit_plugin.task_graph import required_tasks
    from build_tasks.runtime.digests import ContentChecker, digest
    from build_tasks.runtime.distributions import versions
    from build_tasks.runtime.stage import stage_of

    control = TaskControl(load_tasks(vars(dodo)))
    control.process(dodo.DOIT_CONFIG["default_tasks"])
    tasks = [control.tasks[name] for name in required_tasks(control.tasks, control.selected_tasks)]
    stages = [(task, stage) for task in tasks if (stage := stage_of(task))]
    for task, stage in stages:
        for name, path in stage.outputs.items():
            if name == "folder":  # of a published model, or of its clients
                published = path.startswith("model_repository/")
                os.makedirs(f"{path}/1" if published else path)
                for file in PUBLISHED if published else CLIENTS:
                    Path(path, file).write_text(f"{task.name} {file}\n", encoding="utf-8")
            else:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                Path(path).write_text(f"{task.name} {name}\n", encoding="utf-8")
    time.sleep(0.1)  # a file of this moment is too young for its digest to be remembered
    records = Dependency(SqliteDB, dodo.DOIT_CONFIG["dep_file"], checker_cls=ContentChecker)
    for task, stage in stages:
        task.values = {
            "inputs": {path: digest(path) for path in stage.dependency_paths()},
            "elsewhere": {},
            "settings": stage.settings,
            "tools": versions(stage.tools),
            "outputs": {path: digest(path) for path in stage.outputs.values()},
            "sizes": {},
            "notes": {},
            "seconds": 1.0,
        }
        records.save_success(task)
    records.close()


def plain_doit(folder: Path, count: int) -> Callable[[], float]:
    sources(folder, count)
    steps = "".join(
        f"        yield {{'name': f'{{m}}/{to}', 'file_dep': [f'{{m}}/{of}'], 'targets': [f'{{m}}/{to}'],\n"
        f"               'actions': ['cp %(dependencies)s %(targets)s']}}\n"
        for of, to in itertools.pairwise(CHAIN)
    )
    models = f"(f'm{{index:04}}' for index in range({count}))"
    (folder / "dodo.py").write_text(f"def task_chain():\n    for m in {models}:\n{steps}", encoding="utf-8")
    # As if it had run: the chain's files, and doit's own notion of them.
    for index in range(count):
        for name in CHAIN[1:]:
            shutil.copy(folder / f"m{index:04}/source", folder / f"m{index:04}/{name}")
    subprocess.run([DOIT, "reset-dep"], cwd=folder, check=True, stdout=subprocess.DEVNULL)

    def run() -> float:
        seconds, output = timed([DOIT], folder)
        if re.search(r"^\. ", output, re.MULTILINE):
            sys.exit(f"plain doit should have nothing to do, and says:\n{output[-500:]}")
        return seconds

    return run


def ninja(folder: Path, count: int) -> Callable[[], float]:
    sources(folder, count)
    steps = "".join(
        f"build m{index:04}/{to}: cp m{index:04}/{of}\n"
        for index in range(count)
        for of, to in itertools.pairwise(CHAIN)
    )
    (folder / "build.ninja").write_text(f"rule cp\n  command = cp $in $out\n{steps}", encoding="utf-8")
    timed(["ninja"], folder)
    return lambda: quiet(["ninja"], folder, "no work to do")


def snakemake(folder: Path, count: int) -> Callable[[], float]:
    sources(folder, count)
    last = f"expand('m{{n:04}}/{CHAIN[-1]}', n=range({count}))"
    rules = "".join(
        f"rule r{number}:\n    input: '{{m}}/{of}'\n    output: '{{m}}/{to}'\n    shell: 'cp {{input}} {{output}}'\n"
        for number, (of, to) in enumerate(itertools.pairwise(CHAIN))
    )
    (folder / "Snakefile").write_text(f"rule all:\n    input: {last}\n{rules}", encoding="utf-8")
    for index in range(count):
        for name in CHAIN[1:]:
            shutil.copy(folder / f"m{index:04}/source", folder / f"m{index:04}/{name}")
    command = ["snakemake", "--cores", "1"]
    timed([*command, "--touch"], folder)
    return lambda: quiet(command, folder, "Nothing to be done")


def dvc(folder: Path, count: int) -> Callable[[], float]:
    sources(folder, count)
    steps = "".join(
        f"  s{index:04}-{number}:\n    cmd: cp m{index:04}/{of} m{index:04}/{to}\n"
        f"    deps: [m{index:04}/{of}]\n    outs: [m{index:04}/{to}]\n"
        for index in range(count)
        for number, (of, to) in enumerate(itertools.pairwise(CHAIN))
    )
    (folder / "dvc.yaml").write_text(f"stages:\n{steps}", encoding="utf-8")
    alone = {"DVC_NO_ANALYTICS": "1"}
    timed(["dvc", "init", "--no-scm", "--quiet"], folder, **alone)
    timed(["dvc", "repro", "--quiet"], folder, **alone)
    return lambda: quiet(["dvc", "repro"], folder, "up to date", **alone)


def sources(folder: Path, count: int) -> None:
    for index in range(count):
        (folder / f"m{index:04}").mkdir(parents=True)
        (folder / f"m{index:04}/source").write_text(f"{index}\n", encoding="utf-8")


def quiet(command: list[str], folder: Path, said: str, **environment: str) -> float:
    """Seconds of a run that has nothing to do, and says so."""
    seconds, output = timed(command, folder, **environment)
    if said not in output:
        sys.exit(f"{command[0]} should have nothing to do, and says:\n{output[-500:]}")
    return seconds


if __name__ == "__main__":
    main()
