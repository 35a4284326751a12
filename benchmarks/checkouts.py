"""Code that the benchmarks share: a checkout and its doit, copies of projects, timed commands, comparisons in turns.

    this checkout ─┐                                                       ┌─ median of each side
                   ├─► copies of both projects ─► A B A B … in one run ────┤
    --against PATH ┘                                                       └─ ratio of the medians

If two checkouts are measured one after the other, other load on the machine changes the ratio. If they are measured in
turns, the load affects both.
"""

import argparse
import functools
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DOIT = str(Path(sys.executable).with_name("doit"))
REPOSITORY = "model_repository"

Side = tuple[str, Callable[[], float]]  # what is measured, and a function that runs it once and returns the seconds


class Checkout(NamedTuple):
    """A version of this project that is measured.

    Attributes:
        name: How the output calls it.
        root: Its folder.
        doit: The `doit` that runs it. Its environment holds the doit_model_repository.py that fits the checkout.
    """

    name: str
    root: Path
    doit: str

    @property
    def python(self) -> str:
        """The interpreter of the environment that its `doit` is installed in."""
        return str(Path(self.doit).with_name("python"))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a second checkout."""
    parser.add_argument("--against", type=Path, metavar="PATH", help="an older checkout, measured in turns with this")
    parser.add_argument(
        "--against-doit", type=Path, metavar="PATH", help="the doit of the older checkout's environment (the same doit)"
    )


def requested_checkouts(arguments: argparse.Namespace) -> list[Checkout]:
    """This checkout, and the one that --against names. Prints which Python and which folders they are."""
    print(interpreter())
    checkouts = [Checkout("this checkout", ROOT, DOIT)]
    if arguments.against:
        doit = (arguments.against_doit or Path(DOIT)).absolute()  # not resolved: a link would leave its environment
        checkouts.append(Checkout("older checkout", arguments.against.resolve(), str(doit)))
        for name, root, doit_path in checkouts:
            print(f"{name}: {root}, run by {doit_path}")
    return checkouts


def interpreter() -> str:
    """The Python that runs: its start is most of what is measured, and it depends on how Python was compiled."""
    return f"Python {sys.version}"


def copy_project(checkout: Checkout, folder: Path, parts: tuple[str, ...] = ("build_tasks", "models")) -> Path:
    """Copy dodo.py and some folders of a checkout to `folder`, where Python may keep its bytecode."""
    for part in parts:
        shutil.copytree(checkout.root / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(checkout.root / "dodo.py", folder)
    return folder


def remove_results(project: Path) -> None:
    """Remove all that a build has written."""
    for part in ("build", REPOSITORY):
        shutil.rmtree(project / part, ignore_errors=True)


def read_tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by path, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def timed(command: list[str], folder: Path, **environment: str) -> tuple[float, str]:
    """Wall-clock seconds of a command and its output. A command that fails ends the benchmark."""
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


def time_no_op(checkout: Checkout, project: Path, *names: str) -> float:
    """Seconds of a `doit` that has nothing to do. One that builds something ends the benchmark."""
    seconds, output = timed([checkout.doit, *names], project)
    totals = (output.splitlines() or [""])[-1]
    if not re.match(r"\d+ up to date", totals) or re.search(r"^[✓✗]", output, re.MULTILINE):
        sys.exit(f"{checkout.name}: doit should have nothing to do, but its output is:\n{output[-2000:]}")
    return seconds


def no_op(checkout: Checkout, project: Path, *names: str) -> Callable[[], float]:
    """A function that measures a `doit` with nothing to do."""
    return functools.partial(time_no_op, checkout, project, *names)


def empty_doit(checkout: Checkout, folder: Path) -> Callable[[], float]:
    """A function that measures a `doit` with an empty dodo.py, in a new folder: the cost of doit itself."""
    project = folder / f"empty, {checkout.name}"
    project.mkdir(parents=True)
    (project / "dodo.py").touch()
    return lambda: timed([checkout.doit], project)[0]


def time_in_turns(sides: list[Side], runs: int, warm_up: bool = True) -> dict[str, list[float]]:
    """Run all sides in turns, as often as `runs` says, and print the median of each.

    Args:
        warm_up: Run each side once before the clock counts, so that all have their bytecode and files in the cache.
    Returns: The seconds of all runs, by side.
    """
    seconds: dict[str, list[float]] = {name: [] for name, _ in sides}
    if warm_up:
        for _, run in sides:
            run()
    for _ in range(runs):
        for name, run in sides:
            seconds[name].append(run())
    width = max(map(len, seconds))
    for name, times in seconds.items():
        spread = f"min {min(times):.3f}, max {max(times):.3f}, runs {len(times)}"
        print(f"  {name:<{width}}  median {median(times):8.3f} s   ({spread})", flush=True)
    return seconds


def print_ratios(seconds: dict[str, list[float]], sides: list[Side], bases: list[Side], goal: float = math.inf) -> None:
    """Print the ratio of the medians of each side to its base, and of the first side to the second.

    Args:
        seconds: What `time_in_turns` returned.
        sides: The same measurement for each checkout.
        bases: What each of them is compared with.
        goal: What the first ratio should be at most.
    """
    medians = {name: median(times) for name, times in seconds.items()}
    pairs = [(side, base) for (side, _), (base, _) in zip(sides, bases, strict=True)]
    if len(sides) == 2:
        pairs.append((sides[0][0], sides[1][0]))
    for index, (side, base) in enumerate(pairs):
        ratio = medians[side] / medians[base]
        result = "reached" if ratio <= goal else "above the goal"
        result_text = f"   (goal: at most {goal}; {result})" if index == 0 and goal < math.inf else ""
        print(f"  ratio of {side!r} to {base!r}: {ratio:.3f}{result_text}", flush=True)
