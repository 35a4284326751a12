"""Measures the speed of PyTorch for a network in three ways, and the first requests of a batch. Prints tables.

plain          torch.jit.trace of timm's network in fp32, unchanged
published      the same network as `doit` publishes it for a GPU: traced and frozen on the CPU, cast to fp16 inside,
               channels last, fp32 for its clients (build_tasks/formats/torchscript_graph.py), rewritten for it
               (torchscript_gpu.py), saved, and loaded again
torch.compile  timm's network in fp16 and channels last, compiled for each batch (Triton's batching cannot serve that)

Every figure is images per second. A batch lies on the GPU in fp32 NCHW, as Triton passes it on. Each way runs it until
it is warm, and then for a while between two CUDA events. The three take turns at each batch, so that a clock that falls
while the GPU warms up falls for all. Their outputs are compared with those of the network in fp32: if one is wrong, the
benchmark ends. Weights are random: speed does not depend on them, and nothing is downloaded.

    python benchmarks/serving.py [--models NAME ...] [--batches N ...] [--no-compile] [--first] [--json FILE] [--short]

--first   also prints the milliseconds of the first requests at each batch, in a process of its own, so that nothing of
          it has run before: without a warm-up, and with the warm-up that config.pbtxt requests from Triton
--short   one small network on a CPU, to see whether the benchmark runs; its figures mean nothing

It needs PyTorch and timm, and nothing else that doit needs.
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

from build_tasks.formats import torchscript_gpu, torchscript_graph  # noqa: E402  # the project is not an installed package

MODELS = ("efficientnet_b3", "resnet50")
BATCHES = (1, 8, 16, 32, 64, 128)
COMPILED_BATCHES = (1, 8, 32, 128)  # to compile each takes 20 to 40 s
FIRST_BATCHES = (1, 2, 3, 4, 8)  # whose first requests are timed
TRACED_BATCH = 2

WARM_UP = 10  # requests before the clock runs; about three of a shape are enough
MIN_SECONDS = 0.5  # minimum duration of the requests for each figure
MIN_REQUESTS = 10  # behind each figure
MAX_ERROR = 0.1  # relative L2; rounding alone stays below it

Run = Callable[[torch.Tensor], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description="Images per second: plain trace, published model, torch.compile.")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="of timm (%(default)s)")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, metavar="N", help="(%(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes longest")
    parser.add_argument("--first", action="store_true", help="also time the first requests at each batch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--short", action="store_true", help="one small network on the CPU, to see whether this runs")
    parser.add_argument("--requests", nargs=3, metavar=("FILE", "SHAPE", "BATCHES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "`torch.jit")
    if arguments.requests:
        path, shape, warm_up = arguments.requests
        print(json.dumps(first_requests(path, json.loads(shape), arguments.batches, json.loads(warm_up))))
        return
    if arguments.short:
        arguments.models, arguments.batches, arguments.no_compile = ["test_efficientnet"], [1, 2], True
    elif not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU on this machine; --short runs on the CPU")
    device = "cpu" if arguments.short else "cuda"
    figures: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__, "models": {}}
    meaning = "short: the figures mean nothing" if arguments.short else "and the ratio to the plain trace"
    print(f"{figures['device']}, PyTorch {torch.__version__}; images per second, {meaning}\n")
    for model in arguments.models:
        figures["models"][model] = measure_model(model, arguments.batches, device, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def measure_model(name: str, batches: list[int], device: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one network, print its tables, and return their figures."""
    network, shape = create_network(name)
    figures: dict[str, Any] = {"shape": shape, "images per second": [], "first requests": {}}
    with tempfile.TemporaryDirectory() as folder:
        plain, published = save_traces(network, shape, Path(folder))
        sides: dict[str, Run] = {"plain": torch.jit.load(plain, device), "published": torch.jit.load(published, device)}
        if device == "cpu":  # where PyTorch's fp16 rounds otherwise
            sides["published"] = functools.partial(torchscript_graph.run_with_gpu_rounding, sides["published"])
        compiled = None if arguments.no_compile else compile_half(network, device)
        network.to(device)
        print(f"{name} at {' x '.join(map(str, shape[1:]))}")
        titles = [*sides, *([] if compiled is None else ["torch.compile"])]
        print(f"{'batch':>7}" + "".join(f"{title:>16}" for title in titles))
        for size in batches:
            batch = torch.randn(size, *shape, device=device)
            ways = dict(sides)
            if compiled is not None and size in COMPILED_BATCHES:
                ways["torch.compile"] = compiled
            row = {"batch": size, **rates(ways, batch, network)}
            figures["images per second"].append(row)
            print(f"{size:>7}" + "".join(format_cell(row, title) for title in titles), flush=True)
        if arguments.first or arguments.short:
            del sides, compiled
            warm_ups = {
                "no warm-up": [],
                "1 and the largest": [1, max(FIRST_BATCHES)],
                "every batch": range(1, max(FIRST_BATCHES) + 1),
            }
            if arguments.short:
                warm_ups = {"every batch": batches}
            figures["first requests"] = time_first_requests(
                published, shape, batches if arguments.short else FIRST_BATCHES, warm_ups
            )
    print()
    return figures


def format_cell(row: dict[str, Any], title: str) -> str:
    if title not in row:
        return f"{'-':>16}"
    return f"{row[title]:>8.0f}" + (f" x {row[title] / row['plain']:<5.2f}" if title != "plain" else " " * 8)


def create_network(name: str) -> tuple[torch.nn.Module, tuple[int, int, int]]:
    """A network of timm in inference mode with random weights, and (channels, height, width) of its images.

    Its batch normalization has the statistics of random input. Without them, the values in a deep network
    would leave the range of fp16.
    """
    import timm

    torch.manual_seed(0)
    network: Any = timm.create_model(name)
    shape = network.default_cfg["input_size"]
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
            module.reset_running_stats()
    network.train()
    with torch.no_grad():
        network(torch.randn(8, *shape))
    return network.eval().requires_grad_(False), shape


def save_traces(network: torch.nn.Module, shape: tuple[int, int, int], folder: Path) -> tuple[str, str]:
    """Write the plain trace and the published model, both made on the CPU; returns the paths of the files."""
    batch = torch.randn(TRACED_BATCH, *shape)
    plain, exact, published = (str(folder / name / "model.pt") for name in ("plain", "exact", "published"))
    with torch.no_grad():
        trace = torch.jit.trace(network, batch, check_trace=False)
        for path, module in ((plain, trace), (exact, torch.jit.freeze(trace))):
            Path(path).parent.mkdir()
            torchscript_graph.save_torchscript(module, path)
    Path(published).parent.mkdir()
    cast = torchscript_graph.cast_trace(exact, "fp16", "channels_last")
    torchscript_gpu.rewrite_for_gpu(cast, [batch])
    torchscript_graph.save_torchscript(cast, published)
    return plain, published


def compile_half(network: torch.nn.Module, device: str) -> Run:
    """The network compiled by torch.compile for each batch: fp16 inside and channels last, as it is published."""
    module = copy.deepcopy(network).to(device, torch.float16).to(memory_format=torch.channels_last)

    def forward(batch: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = module(batch.half().contiguous(memory_format=torch.channels_last))
        return output.float()

    compiled: Run = torch.compile(forward, dynamic=False)
    return compiled


@torch.inference_mode()
def rates(ways: dict[str, Run], batch: torch.Tensor, network: torch.nn.Module) -> dict[str, float]:
    """Images per second of each way."""
    expected = network(batch)
    for name, run in ways.items():
        for _ in range(WARM_UP if batch.is_cuda else 2):
            output = run(batch)
        error = float((output - expected).norm() / expected.norm())
        if not error < MAX_ERROR:
            sys.exit(f"{name} is wrong at batch {len(batch)}: the relative L2 error of its outputs is {error:.1e}")
    best = dict.fromkeys(ways, 0.0)
    for _ in range(3 if batch.is_cuda else 1):  # in turns; the best of three counts
        for name, run in ways.items():
            best[name] = max(best[name], rate(run, batch))
    return best


def rate(run: Run, batch: torch.Tensor) -> float:
    """Images per second, over enough requests to fill a third of MIN_SECONDS."""
    seconds = timed(run, batch, MIN_REQUESTS if batch.is_cuda else 1)
    count = max(MIN_REQUESTS, round(MIN_SECONDS / 3 / seconds)) if batch.is_cuda else 1
    return len(batch) / timed(run, batch, count)


def timed(run: Run, batch: torch.Tensor, count: int) -> float:
    """Seconds of one request, the mean over `count` of them; on a GPU by CUDA events."""
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


def time_first_requests(
    path: str, shape: tuple[int, int, int], sizes: Sequence[int], warm_ups: dict[str, Sequence[int]]
) -> dict[str, Any]:
    """Time the first requests at some batches, after requests at others; prints and returns a row for each warm-up.

    Args:
        sizes: Batches that are timed.
        warm_ups: Batches that run before, by the title of the row.
    """
    rows = {}
    print("\n  milliseconds of the published model: the first three requests at a batch, and the tenth")
    print(f"  {'warmed up, twice each':<24}{'it took':>8}" + "".join(f"{f'batch {size}':>22}" for size in sizes))
    for title, warm_up in warm_ups.items():
        command = [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--requests",
            path,
            json.dumps(shape),
            json.dumps([*warm_up]),
        ]
        command += ["--batches", *map(str, sizes)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"the first requests failed:\n{run.stderr}")
        row = rows[title] = json.loads(run.stdout)
        cells = "".join(f"{' '.join(f'{value:.0f}' for value in row['requests'][str(size)]):>22}" for size in sizes)
        print(f"  {title:<24}{row['seconds']:>6.1f} s{cells}", flush=True)
    return rows


@torch.inference_mode()
def first_requests(path: str, shape: list[int], sizes: list[int], warm_up: list[int]) -> dict[str, Any]:
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
    for size in warm_up:
        for _ in range(2):
            request(size)
    seconds = time.perf_counter() - started
    requests = {}
    for size in sizes:
        times = [request(size) for _ in range(10 if device == "cuda" else 3)]
        requests[size] = [*times[:3], *times[9:]]
    return {"seconds": seconds, "requests": requests}


if __name__ == "__main__":
    main()
