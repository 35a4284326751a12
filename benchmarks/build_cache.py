"""What a hit of the build cache costs: a large file against `cp`, and models from a bucket against building them.

a large file  BuildCache.fetch over `cp`, between two folders, in turns       goal: at most 1.5
models        doit into an empty bucket, doit in a second checkout, and doit with nothing to do

    python benchmarks/build_cache.py [--gigabytes 2] [--runs 5] [--models 20] [--folder /dev/shm]

Neither side of the first part waits for the disk at its end: doit flushes what it fetched as it does what it built. The
files of the previous run are flushed before the next one. The models are timm's small test networks with random
weights, built by the real stages, and the bucket is one of moto's S3 server on this machine. The second checkout cannot
import PyTorch, and must have the same bytes in model_repository/.
"""

import argparse
import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from checkouts import interpreter, print_ratios, time_in_turns

sys.path.insert(0, str(Path(__file__).parent.parent))

from build_tasks.runtime.build_cache import BuildCache
from build_tasks.runtime.cache_entries import Action, Blob, Output
from tests.support import cache_server, fakes
from tests.support.project import TINY, Project, Run

BLOCK = 64 << 20  # bytes
SPEC = TINY.replace('labels = "labels.txt"\n', "")


def compare_with_cp(folder: Path, size: int, runs: int) -> None:
    """Fetch a file from a folder as the cache, and copy it with `cp`, in turns."""
    os.chdir(folder)
    blob = write_blob(folder / "cache", size)
    action = Action("weights", {"target": Output(blob.sha256, {"": blob})}, {}, {}, 0.0, {}, time.time())
    cache = BuildCache(f"file://{folder}/cache", writes=False)
    target = folder / "target"
    used = {}

    def fetch() -> float:
        target.unlink(missing_ok=True)
        os.sync()
        started, before = time.perf_counter(), time.process_time()
        if not cache.fetch("key", action, {"target": str(target)}, "weights:model"):
            sys.exit("the file was not fetched")
        used["fetch"] = time.process_time() - before
        return time.perf_counter() - started

    def cp() -> float:
        target.unlink(missing_ok=True)
        os.sync()
        started, before = time.perf_counter(), os.times()
        subprocess.run(["cp", folder / "cache" / blob.path, target], check=True)
        after = os.times()
        used["cp"] = after.children_user + after.children_system - before.children_user - before.children_system
        return time.perf_counter() - started

    print(f"a file of {size / 1e9:g} GB, from one folder to another in {folder}:")
    sides = [("fetch", fetch), ("cp", cp)]
    seconds = time_in_turns(sides, runs)
    print_ratios(seconds, sides[:1], sides[1:], goal=1.5)
    print(f"  CPU time of the last run: fetch {used['fetch']:.2f} s in two threads, cp {used['cp']:.2f} s")


def write_blob(cache: Path, size: int) -> Blob:
    """Write a file of random bytes into a cache, and return it."""
    block, sha256, draft = os.urandom(BLOCK), hashlib.sha256(), cache / "draft"
    cache.mkdir()
    with draft.open("wb") as file:
        for start in range(0, size, BLOCK):
            part = block[: size - start]
            sha256.update(part)
            file.write(part)
    name = sha256.hexdigest()
    blob = Blob(name, size, name, size)
    (cache / blob.path).parent.mkdir(parents=True)
    draft.rename(cache / blob.path)
    return blob


def build_and_fetch(folder: Path, models: int) -> None:
    """Build models into a bucket, fetch them in a second checkout, and build again with nothing to do."""

    def checkout(name: str) -> Project:
        project = Project(folder / name)
        for index in range(models):  # no two of them share a step
            spec = SPEC.replace("max_batch_size = 4", f"max_batch_size = {2 + index}")
            project.model(f"m{index}", spec.replace("weights.safetensors", f"random://{index}"))
        return project

    def timed(project: Project, *arguments: str, **environment: str) -> Run:
        started = time.perf_counter()
        run = project.built(*arguments, **environment)
        seconds, totals = time.perf_counter() - started, "; ".join(run.out.splitlines()[-2:])
        print(f"  {project.root.name}  {seconds:8.2f} s   {totals}", flush=True)
        return run

    print(f"{models} models, with a bucket on this machine (a new one, in a second checkout, with nothing to do):")
    without_torch = fakes.machine(folder, tensorrt=None, gpus=None, torch=False)
    with cache_server.s3() as bucket:
        first, second = checkout("cold"), checkout("warm")
        timed(first, "-n", "2", **bucket)
        timed(second, **bucket, **without_torch)
        timed(second, **bucket, **without_torch)
    if first.tree() != second.tree():
        sys.exit("the second checkout has other bytes in model_repository/")
    print(f"  the same bytes in all {len(first.tree())} published files")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the large file; 0 leaves this part out")
    parser.add_argument("--runs", type=int, default=5, help="of each side")
    parser.add_argument("--models", type=int, default=20, help="0 leaves this part out")
    parser.add_argument("--folder", help="where all files are written (the folder for temporary files)")
    arguments = parser.parse_args()
    print(interpreter())
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary, contextlib.chdir(temporary):
        if arguments.gigabytes:
            compare_with_cp(Path(temporary), int(arguments.gigabytes * 1e9), arguments.runs)
        if arguments.models:
            build_and_fetch(Path(temporary), arguments.models)


if __name__ == "__main__":
    main()
