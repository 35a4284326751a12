"""What PyTorch serves, three ways, and what the first request of a batch costs: one table, from one run.

plain          torch.jit.trace of timm's network in fp32, as it stands
ours           the same network as `doit` publishes it for a GPU: traced and frozen on the CPU, cast to fp16 inside,
               channels last, fp32 between it and its clients (build_tasks/formats/torchscript_graph.py),
               saved, and loaded anew
torch.compile  timm's network in fp16 and channels last, compiled for each batch (what Triton's batching cannot serve)

Every figure is images per second. A batch lies on the GPU in fp32 NCHW, as Triton hands it over; each way runs it until
it is warm, and then for a while between two CUDA events. The three take turns at each batch, so that a clock that
falls as the GPU warms up falls for all. Their answers are compared with those of the network in fp32: a way that is
fast and wrong ends the benchmark. Weights are random: speed does not depend on them, and there is no download.

    python benchmarks/serving.py [--models NAME ...] [--batches N ...] [--no-compile] [--first] [--json FILE] [--short]

--first   besides: the milliseconds of the first requests at each batch, in a process of its own, so that nothing of it
          has run before; without a warm-up, and with the one that config.pbtxt asks Triton for
--short   on a CPU, one small network, no verdict: whether it runs

Needs PyTorch and timm alone; nothing that doit needs.
"""

import argparse
import copy
import functools
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from build_tasks.formats import torchscript_graph  # noqa: E402  # of the project, which is no package that is installed

MODELS = ("efficientnet_b3", "resnet50")
BATCHES = (1, 8, 16, 32, 64, 128)
COMPILED = (1, 8, 32, 128)  # at 20 to 40 s each
FIRST = (1, 2, 3, 4, 8)  # batches whose first requests are timed
TRACED_BATCH = 2

WARM = 10  # requests before the clock runs; some three of a shape are enough
SECONDS = 0.5  # that a figure is measured for, at least
LEAST = 10  # requests, at least
WRONG = 0.1  # relative L2 error that no rounding explains

Run = Callable[[torch.Tensor], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description="Images per second: plain trace, ours, torch.compile.")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="of timm (%(default)s)")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, metavar="N", help="(%(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes longest")
    parser.add_argument("--first", action="store_true", help="besides, the first requests at each batch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--short", action="store_true", help="one small network on the CPU: whether it runs")
    parser.add_argument("--requests", nargs=3, metavar=("FILE", "SHAPE", "WARM"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "`torch.jit")
    if arguments.requests:
        path, shape, warm = arguments.requests
        print(json.dumps(first_requests(path, json.loads(shape), arguments.batches, json.loads(warm))))
        return
    if arguments.short:
        arguments.models, arguments.batches, arguments.no_compile = ["test_efficientnet"], [1, 2], True
    elif not torch.cuda.is_available():
        sys.exit("there is no GPU here that PyTorch can use; --short runs on the CPU")
    device = "cpu" if arguments.short else "cuda"
    figures: dict[str, Any] = {"device": name_of(device), "torch": torch.__version__, "models": {}}
    what = "whether it runs; the figures mean nothing" if arguments.short else "and the ratio to the plain trace"
    print(f"{figures['device']}, PyTorch {torch.__version__}; images per second, {what}\n")
    for model in arguments.models:
        figures["models"][model] = compared(model, arguments.batches, device, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def name_of(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def compared(name: str, batches: list[int], device: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The tables of one network."""
    network, shape = created(name)
    found: dict[str, Any] = {"shape": shape, "images per second": [], "first requests": {}}
    with tempfile.TemporaryDirectory() as folder:
        plain, ours = made(network, shape, Path(folder))
        sides: dict[str, Run] = {"plain": torch.jit.load(plain, device), "ours": torch.jit.load(ours, device)}
        if device == "cpu":  # PyTorch's fp16 there is for checks
            sides["ours"] = functools.partial(torchscript_graph.run_with_gpu_rounding, sides["ours"])
        compiled = None if arguments.no_compile else half(network, device)
        network.to(device)
        print(f"{name} at {' x '.join(map(str, shape[1:]))}")
        titles = [*sides, *([] if compiled is None else ["torch.compile"])]
        print(f"{'batch':>7}" + "".join(f"{title:>16}" for title in titles))
        for size in batches:
            batch = torch.randn(size, *shape, device=device)
            ways = dict(sides)
            if compiled is not None and size in COMPILED:
                ways["torch.compile"] = compiled
            row = {"batch": size, **rates(ways, batch, network)}
            found["images per second"].append(row)
            print(f"{size:>7}" + "".join(cell(row, title) for title in titles), flush=True)
        if arguments.first or arguments.short:
            del sides, compiled
            warmed = {"no warm-up": [], "1 and the largest": [1, max(FIRST)], "every batch": range(1, max(FIRST) + 1)}
            if arguments.short:
                warmed = {"every batch": batches}
            found["first requests"] = first(ours, shape, batches if arguments.short else FIRST, warmed)
    print()
    return found


def cell(row: dict[str, Any], title: str) -> str:
    if title not in row:
        return f"{'-':>16}"
    return f"{row[title]:>8.0f}" + (f" x {row[title] / row['plain']:<5.2f}" if title != "plain" else " " * 8)


def created(name: str) -> tuple[torch.nn.Module, tuple[int, int, int]]:
    """A network of timm in inference mode with random weights, and (channels, height, width) of an image.

    The statistics of its batch normalisation are those of some noise: without them, a deep network's values would
    leave the range of fp16.
    """
    import timm

    torch.manual_seed(0)
    network: Any = timm.create_model(name)
    shape = network.default_cfg["input_size"]
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean of all that was seen
            module.reset_running_stats()
    network.train()
    with torch.no_grad():
        network(torch.randn(8, *shape))
    return network.eval().requires_grad_(False), shape


def made(network: torch.nn.Module, shape: tuple[int, int, int], folder: Path) -> tuple[str, str]:
    """The files of the plain trace, and of ours; both are made on the CPU."""
    batch = torch.randn(TRACED_BATCH, *shape)
    plain, exact, ours = (str(folder / name / "model.pt") for name in ("plain", "exact", "ours"))
    with torch.no_grad():
        trace = torch.jit.trace(network, batch, check_trace=False)
        for path, module in ((plain, trace), (exact, torch.jit.freeze(trace))):
            Path(path).parent.mkdir()
            torchscript_graph.save_torchscript(module, path)
    Path(ours).parent.mkdir()
    torchscript_graph.save_torchscript(torchscript_graph.cast_trace(exact, "fp16", "channels_last"), ours)
    return plain, ours


def half(network: torch.nn.Module, device: str) -> Run:
    """torch.compile's: fp16 inside and channels last as ours, for each batch anew."""
    module = copy.deepcopy(network).to(device, torch.float16).to(memory_format=torch.channels_last)

    def forward(batch: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = module(batch.half().contiguous(memory_format=torch.channels_last))
        return answer.float()

    compiled: Run = torch.compile(forward, dynamic=False)
    return compiled


@torch.inference_mode()
def rates(ways: dict[str, Run], batch: torch.Tensor, network: torch.nn.Module) -> dict[str, float]:
    """Images per second of each way."""
    expected = network(batch)
    for name, run in ways.items():
        for _ in range(WARM if batch.is_cuda else 2):
            answer = run(batch)
        off = float((answer - expected).norm() / expected.norm())
        if not off < WRONG:
            sys.exit(f"{name} is wrong at batch {len(batch)}: its answers are off by {off:.1e} of their size")
    found = dict.fromkeys(ways, 0.0)
    for _ in range(3 if batch.is_cuda else 1):  # in turns; the best of three
        for name, run in ways.items():
            found[name] = max(found[name], rate(run, batch))
    return found


def rate(run: Run, batch: torch.Tensor) -> float:
    """Images per second, by CUDA events around as many requests as fill some time."""
    seconds = timed(run, batch, LEAST if batch.is_cuda else 1)
    count = max(LEAST, round(SECONDS / 3 / seconds)) if batch.is_cuda else 1
    return len(batch) / timed(run, batch, count)


def timed(run: Run, batch: torch.Tensor, count: int) -> float:
    """Seconds of one request."""
    if not batch.is_cuda:
        started = time.perf_counter()
        for _ in range(count):
            run(batch)
        return (time.perf_counter() - started) / count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        run(batch)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / count


def first(
    path: str, shape: tuple[int, int, int], sizes: Sequence[int], warmed: dict[str, Sequence[int]]
) -> dict[str, Any]:
    """The first requests at some batches, after warming up others; a row for each title of `warmed`."""
    found = {}
    print("\n  milliseconds of ours: the first three requests at a batch, and the tenth")
    print(f"  {'warmed up, twice each':<24}{'it took':>8}" + "".join(f"{f'batch {size}':>22}" for size in sizes))
    for title, warm in warmed.items():
        command = [sys.executable, "-W", "ignore", __file__, "--requests", path, json.dumps(shape), json.dumps([*warm])]
        command += ["--batches", *map(str, sizes)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"the first requests failed:\n{run.stderr}")
        told = found[title] = json.loads(run.stdout)
        cells = "".join(f"{' '.join(f'{value:.0f}' for value in told['requests'][str(size)]):>22}" for size in sizes)
        print(f"  {title:<24}{told['seconds']:>6.1f} s{cells}", flush=True)
    return found


@torch.inference_mode()
def first_requests(path: str, shape: list[int], sizes: list[int], warm: list[int]) -> dict[str, Any]:
    """Seconds of the warm-up; milliseconds of the first three requests and of a tenth, by batch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = torch.jit.load(path, device)
    run = module if device == "cuda" else functools.partial(torchscript_graph.run_with_gpu_rounding, module)

    def request(size: int) -> float:
        batch = torch.randn(size, *shape, device=device)
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run(batch).cpu()
        return (time.perf_counter() - started) * 1000

    started = time.perf_counter()
    for size in warm:
        for _ in range(2):
            request(size)
    seconds = time.perf_counter() - started
    requests = {}
    for size in sizes:
        taken = [request(size) for _ in range(10 if device == "cuda" else 3)]
        requests[size] = [*taken[:3], *taken[9:]]
    return {"seconds": seconds, "requests": requests}


if __name__ == "__main__":
    main()
