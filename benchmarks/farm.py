"""Time of `doit farm` with 1, 2, 4 and 8 workers on this machine, whose stages sleep: what the farm itself costs.

    python benchmarks/farm.py [--seconds 12] [--workers 1 2 4 8]

A stage sleeps, so that workers do not compete for the cores of one machine. The ideal is the sum of all sleeps divided
by the number of workers. A second table has the overhead for a unit (stages that do not sleep) and for a byte.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.light_stages import use_light_stages  # noqa: E402
from tests.support.project import DOIT, TINY, Project  # noqa: E402

MODELS = 8
SLEEPING = 6  # stages of one model that a worker runs
SPEC = TINY.replace('labels = "labels.txt"\n', "")


def project_of(folder: Path, models: int) -> Project:
    """A project whose models share no step."""
    project = Project(folder)
    use_light_stages(project, processes=True)
    for index in range(models):
        spec = SPEC.replace("max_batch_size = 4", f"max_batch_size = {2 + index}")
        project.model(f"m{index}", spec.replace("weights.safetensors", f"random://{index}"))
    return project


def farm(folder: Path, workers: int, models: int, seconds: float) -> tuple[float, float, str]:
    """Return the seconds of the units and of the whole command, and its output."""
    project = project_of(folder, models)
    environment = {**os.environ, "LIGHT_STAGE_SECONDS": str(seconds)}
    started = time.monotonic()
    command = [DOIT, "farm", "--local", str(workers)]
    run = subprocess.run(command, cwd=project.root, env=environment, capture_output=True, text=True, check=False)
    whole = time.monotonic() - started
    found = re.search(r"units took ([\d.]+) s", run.stdout)
    if run.returncode or not found:
        raise SystemExit(run.stdout + run.stderr)
    return float(found[1]), whole, run.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0, help="that each stage sleeps")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print("workers  ideal s  units s  ideal/units  whole command s")
        for workers in arguments.workers:
            units, whole, _ = farm(Path(temporary) / f"w{workers}", workers, MODELS, arguments.seconds)
            ideal = MODELS * SLEEPING * arguments.seconds / workers
            print(f"{workers:7}  {ideal:7.1f}  {units:7.1f}  {ideal / units:11.2f}  {whole:15.1f}", flush=True)
        units, _, _ = farm(Path(temporary) / "overhead", 1, MODELS, 0.0)
        print(f"overhead of a unit of {SLEEPING} stages that do nothing: {units / MODELS:.2f} s")


if __name__ == "__main__":
    main()
