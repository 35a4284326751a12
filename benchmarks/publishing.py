"""Measures the cost of publishing a large artifact: bytes over its size, and time over the time of `cp`.

The real stages build a model that is mostly weights, up to the step before publishing. Then these are measured:

publish        `doit publish:large` with model_repository/ beside build/, and on another file system   goal: reads 0, 1
               bytes and time over the figures of `cp model.pt` to the same place
a new config   the same after an edit of [triton]. On one file system the artifact is linked again     goal: reads 0
touched        the next `doit` after model.pt was touched, and the one after that                      goal: reads 1, 0

Bytes are counted at system calls (rchar and wchar in /proc/self/io, with all children that have ended), so they include
reads from the page cache. The bytes that a `doit` with nothing to do reads, mostly Python's own files, are subtracted.
On one file system `cp` is kept from cloning the file. A `sync` before each command gives all the same start. The time
of doit includes its start and its fsync, the time of `cp` includes neither.

There is no limit for the figures. The benchmark ends with an error if a build fails, or if a published file
differs from its artifact.

    python benchmarks/publishing.py [--short] [--gigabytes N] [--elsewhere FOLDER]
"""

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from checkouts import DOIT, ROOT, Checkout, copy_project

NAME = "large"
SPEC = """\
formats = ["torchscript"]
max_batch_size = 2

[architecture]
network = "network.py:build"
arguments = {{ rows = {rows} }}

[input]
shape = [3, 8, 8]

[weights]
source = "random://0"

[accuracy]
allow_untestable = true
"""
NETWORK = """\
import torch
from torch import nn


class Network(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.table = nn.Parameter(torch.arange(rows * 1024, dtype=torch.float32).view(rows, 1024))

    def forward(self, x):
        features = x.mean(dim=(2, 3))
        row = (features.sum(dim=1) > -1e9).long()  # always row 1, but a tracer cannot know that
        return features.sum(dim=1, keepdim=True) * self.table[row][:, :8]


build = Network
"""
ROW = 4096  # bytes
ARTIFACT = f"build/{NAME}/model.pt"
PUBLISHED = f"model_repository/{NAME}/1/model.pt"


class Cost(NamedTuple):
    """What a command costs.

    Attributes:
        bytes_read: By system calls.
        bytes_written: By system calls.
        seconds: By the wall clock.
    """

    bytes_read: int
    bytes_written: int
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description="What publishing a large artifact costs, over cp.")
    parser.add_argument("--short", action="store_true", help="an artifact of 64 MB")
    parser.add_argument("--gigabytes", type=float, default=2, metavar="N", help="size of the artifact (2)")
    parser.add_argument(
        "--elsewhere",
        dest="other_disk",
        type=Path,
        default=Path("/dev/shm"),
        metavar="FOLDER",
        help="a folder on another file system (/dev/shm)",
    )
    arguments = parser.parse_args()
    rows = round((0.064 if arguments.short else arguments.gigabytes) * 1e9 / ROW)
    with (
        tempfile.TemporaryDirectory(prefix="publishing-") as folder,
        tempfile.TemporaryDirectory(prefix="publishing-", dir=arguments.other_disk) as other_disk,
    ):
        if os.stat(folder).st_dev == os.stat(other_disk).st_dev:
            sys.exit(f"{other_disk} is on the same file system as {folder}: name another one with --elsewhere")
        checkout = Checkout("this checkout", ROOT, DOIT)
        os.chdir(copy_project(checkout, Path(folder) / "project", parts=("build_tasks",)))
        measure(rows, Path(other_disk))


def measure(rows: int, other_disk: Path) -> None:
    """Build the model, and print a line for each command."""
    folder = Path(f"models/{NAME}")
    folder.mkdir(parents=True)
    (folder / "model.toml").write_text(SPEC.format(rows=rows), encoding="utf-8")
    (folder / "network.py").write_text(NETWORK, encoding="utf-8")
    print(f"building {NAME}, {rows * ROW / 1e9:.2f} GB …", flush=True)
    run(DOIT, f"accuracy:{NAME}", f"config:{NAME}")
    size = os.path.getsize(ARTIFACT)
    no_op = run(DOIT, f"accuracy:{NAME}", f"config:{NAME}")

    def print_row(title: str, cost: Cost, copy: Cost | None = None) -> None:
        read = (cost.bytes_read - no_op.bytes_read) / size
        written = (cost.bytes_written - no_op.bytes_written) / size
        line = f"{title:<46} {read:6.2f} {written:8.2f} {cost.seconds:8.2f} s"
        print(line + (f" {copy.seconds:8.2f} s {cost.seconds / copy.seconds:7.2f}" if copy else ""), flush=True)

    def publish(title: str, target: Path) -> None:
        copy = run("cp", "--reflink=never", ARTIFACT, str(target / "copy"))
        (target / "copy").unlink()
        print_row(title, run(DOIT, f"publish:{NAME}"), copy)
        if not filecmp.cmp(ARTIFACT, PUBLISHED, shallow=False):
            sys.exit(f"{PUBLISHED} differs from {ARTIFACT}")

    def edit_config(count: int) -> None:
        (folder / "model.toml").write_text(
            f"{SPEC.format(rows=rows)}[triton]\ninstance_group = [{{ count = {count} }}]\n"
        )

    print(f"{'bytes over those of model.pt':<46} {'read':>6} {'written':>8} {'time':>10} {'cp':>10} {'ratio':>7}")
    publish("published on one file system", Path())
    print_row("… then nothing to do", run(DOIT, f"publish:{NAME}"))
    edit_config(2)
    publish("another config", Path())
    print_row("… then nothing to do", run(DOIT, f"publish:{NAME}"))
    shutil.rmtree("model_repository")
    os.symlink(other_disk, "model_repository")
    print_row("model_repository/ removed by hand: read once", run(DOIT, f"accuracy:{NAME}", f"config:{NAME}"))
    publish("published on another file system", other_disk)
    print_row("… then nothing to do", run(DOIT, f"publish:{NAME}"))
    os.utime(ARTIFACT)
    print_row("model.pt touched, the next doit", run(DOIT, f"publish:{NAME}"))
    print_row("… and the one after that", run(DOIT, f"publish:{NAME}"))


def run(*command: str) -> Cost:
    """What a command costs. A command that fails ends the benchmark."""
    subprocess.run(["sync"], check=True)
    before, started = read_counters(), time.perf_counter()
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    seconds, after = time.perf_counter() - started, read_counters()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with exit code {process.returncode}:\n{process.stdout}")
    return Cost(after["rchar"] - before["rchar"], after["wchar"] - before["wchar"], seconds)


def read_counters() -> dict[str, int]:
    """Bytes by system calls of this process and of all its descendants that have ended.

    Source: man 5 proc_pid_io.
    """
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


if __name__ == "__main__":
    main()
