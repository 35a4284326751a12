"""What publishing a large artifact costs: bytes read and written, over those of the artifact, and time over `cp`.

A model of mostly weights is built by the real stages up to where it is published. Then:

publish        `doit publish:large` with model_repository/ beside build/, and on another file system   goal: reads 0, 1
               bytes and time over those of `cp model.pt` to the same place
a new config   the same after an edit of [triton]; on one file system the artifact is linked again     goal: reads 0
touched        the next `doit`, and the one after that, when model.pt was touched                      goal: reads 1, 0

Bytes are those of system calls (/proc/self/io: rchar and wchar, with all children that ended), so they count what the
page cache answers, too; what a plain `doit` with nothing to do reads, Python's own files above all, is taken off.
`cp` on one file system is kept from cloning. A `sync` before each lets both sides begin alike; doit's time holds its
start and its fsync, that of `cp` neither.

The figures are shown, never judged. What ends with an error is a build that fails, or bytes that differ.

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

from overhead import DOIT, copy_of_project

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
        row = (features.sum(dim=1) > -1e9).long()  # always the same, which no tracer knows
        return features.sum(dim=1, keepdim=True) * self.table[row][:, :8]


build = Network
"""
ROW = 4096  # bytes
ARTIFACT = f"build/{NAME}/model.pt"
PUBLISHED = f"model_repository/{NAME}/1/model.pt"


def main() -> None:
    parser = argparse.ArgumentParser(description="What publishing a large artifact costs, over cp.")
    parser.add_argument("--short", action="store_true", help="64 MB")
    parser.add_argument("--gigabytes", type=float, default=2, metavar="N", help="size of the artifact (2)")
    parser.add_argument(
        "--elsewhere", type=Path, default=Path("/dev/shm"), metavar="FOLDER", help="on another file system (/dev/shm)"
    )
    arguments = parser.parse_args()
    rows = round((0.064 if arguments.short else arguments.gigabytes) * 1e9 / ROW)
    with (
        tempfile.TemporaryDirectory(prefix="publishing-") as here,
        tempfile.TemporaryDirectory(prefix="publishing-", dir=arguments.elsewhere) as elsewhere,
    ):
        if os.stat(here).st_dev == os.stat(elsewhere).st_dev:
            sys.exit(f"{elsewhere} is on the file system of {here}: name another with --elsewhere")
        os.chdir(copy_of_project(Path(here) / "project", parts=("build_tasks",)))
        compare(rows, Path(elsewhere))


def compare(rows: int, elsewhere: Path) -> None:
    folder = Path(f"models/{NAME}")
    folder.mkdir(parents=True)
    (folder / "model.toml").write_text(SPEC.format(rows=rows), encoding="utf-8")
    (folder / "network.py").write_text(NETWORK, encoding="utf-8")
    print(f"building {NAME}, {rows * ROW / 1e9:.2f} GB …", flush=True)
    run(DOIT, f"accuracy:{NAME}", f"config:{NAME}")
    size = os.path.getsize(ARTIFACT)
    idle = run(DOIT, f"accuracy:{NAME}", f"config:{NAME}")

    def row(what: str, cost: "Cost", copy: "Cost | None" = None) -> None:
        read, written = ((a - b) / size for a, b in zip(cost[:2], idle[:2], strict=True))
        time = f"{cost[2]:8.2f} s" + (f" {copy[2]:8.2f} s {cost[2] / copy[2]:7.2f}" if copy else "")
        print(f"{what:<46} {read:6.2f} {written:8.2f} {time}", flush=True)

    def publish(what: str, beside: Path) -> None:
        copy = run("cp", "--reflink=never", ARTIFACT, str(beside / "copy"))
        (beside / "copy").unlink()
        cost = run(DOIT, f"publish:{NAME}")
        row(what, cost, copy)
        if not filecmp.cmp(ARTIFACT, PUBLISHED, shallow=False):
            sys.exit(f"{PUBLISHED} is not {ARTIFACT}")

    def edit(count: int) -> None:
        (folder / "model.toml").write_text(
            f"{SPEC.format(rows=rows)}[triton]\ninstance_group = [{{ count = {count} }}]\n"
        )

    print(f"{'bytes over those of model.pt':<46} {'read':>6} {'written':>8} {'time':>10} {'cp':>10} {'ratio':>7}")
    publish("published on one file system", Path())
    row("… then nothing to do", run(DOIT, f"publish:{NAME}"))
    edit(2)
    publish("another config", Path())
    row("… then nothing to do", run(DOIT, f"publish:{NAME}"))
    shutil.rmtree("model_repository")
    os.symlink(elsewhere, "model_repository")
    row("model_repository/ removed by hand: one reading", run(DOIT, f"accuracy:{NAME}", f"config:{NAME}"))
    publish("published on another file system", elsewhere)
    row("… then nothing to do", run(DOIT, f"publish:{NAME}"))
    os.utime(ARTIFACT)
    row("model.pt touched, the next doit", run(DOIT, f"publish:{NAME}"))
    row("… and the one after that", run(DOIT, f"publish:{NAME}"))


Cost = tuple[int, int, float]  # bytes read, bytes written, seconds


def run(*command: str) -> Cost:
    """What a command costs. One that fails ends the benchmark."""
    subprocess.run(["sync"], check=True)
    before, started = counters(), time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    seconds, after = time.perf_counter() - started, counters()
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed with exit code {done.returncode}:\n{done.stdout}")
    return after["rchar"] - before["rchar"], after["wchar"] - before["wchar"], seconds


def counters() -> dict[str, int]:
    """Of this process and of its children that ended, and theirs. Source: man 5 proc_pid_io."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


if __name__ == "__main__":
    main()
