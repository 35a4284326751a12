"""Measures the speed of PyTorch for a network as it is served, and the first requests of a batch. Prints tables.

On a GPU:
plain          torch.jit.trace of timm's network in fp32, unchanged
published      the same network as `doit` publishes it for a GPU: traced and frozen on the CPU, cast to fp16 inside,
               channels last, fp32 for its clients (build_tasks/formats/torchscript_graph.py), rewritten for it
               (torchscript_gpu.py), saved, and loaded again
torch.compile  timm's network in fp16 and channels last, compiled for each batch (Triton's batching cannot serve that)

On a CPU, with all of its cores:
plain          as above
published      traced and frozen, in fp32: one instance with a thread for each core, Triton's default
cores          the same file with one instance of one thread for each core, as triton.cores has it (triton/cpu_cores.py)
torch.compile  timm's network in fp32, compiled for each batch

Each way runs in a process of its own. It warms up as a server does with our config.pbtxt: twice at every batch up to
triton.warm_up and at the largest, from the largest down (derived_config.py); torch.compile only at the batches that are
measured, since it compiles for each. Then the processes take turns, so that other load, or a clock that falls while the
GPU warms up, affects all of them. A cell has the images per second (the median of the rounds), the ratio to the plain
trace (the median of the ratios of each round), and the relative L2 error to the network in fp32 on the CPU. Inputs lie
on the device in fp32 NCHW, as Triton passes them on. Weights are random: speed does not depend on them, and nothing is
downloaded.

    python benchmarks/serving.py [--models NAME ...] [--batches N ...] [--warm-up N] [--rounds N] [--no-compile]
                                 [--device cpu] [--roofline] [--first] [--json FILE] [--short]

--roofline  also prints the share of each figure of the speed that a matrix product and a copy on this device would
            allow, and the FLOPs and bytes of an image (benchmarks/roofline.py)
--first     also prints the first requests at each batch of processes with other warm-ups, or none
--short     one small network on the CPU, to see whether the benchmark runs; its figures mean nothing

It needs PyTorch and timm, and nothing else that doit needs.
"""

import argparse
import contextlib
import copy
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # the project is not an installed package

import roofline  # noqa: E402

from build_tasks.formats import torchscript_gpu, torchscript_graph  # noqa: E402

MODELS = {"cuda": ("efficientnet_b3", "resnet50"), "cpu": ("mobilenetv3_large_100", "resnet50")}
BATCHES = {"cuda": (1, 8, 32, 128), "cpu": (1, 8)}  # torch.compile takes 20 to 40 s for each
WARM_UP = {"cuda": 64, "cpu": 1}  # the default of triton.warm_up; without a GPU the smallest and the largest batch
FIRST_BATCHES = (1, 2, 3, 4, 8)  # whose first requests are timed
TRACED_BATCH = 2
CHECKED_IMAGES = 8  # whose outputs are compared
SECONDS = {"cuda": 0.2, "cpu": 1.0}  # minimum duration of the requests of a round
MIN_REQUESTS = {"cuda": 10, "cpu": 1}
MAX_ERROR = 0.1  # relative L2; rounding alone stays below it

Run = Callable[[torch.Tensor], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description="Images per second: plain trace, published model, torch.compile.")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="of timm")
    parser.add_argument("--batches", nargs="+", type=int, metavar="N")
    parser.add_argument("--warm-up", type=int, metavar="N", help="triton.warm_up")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each process (%(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes longest")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--roofline", action="store_true", help="also print the share of what the device could do")
    parser.add_argument("--first", action="store_true", help="also time the first requests after other warm-ups")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--short", action="store_true", help="one small network on the CPU, to see whether this runs")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "`torch.jit")
    if arguments.short:
        arguments.models, arguments.batches, arguments.rounds = ["test_efficientnet"], [1, 2], 1
        arguments.device, arguments.no_compile, arguments.roofline = "cpu", True, True
    elif arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU on this machine; --device cpu and --short run on the CPU")
    device = arguments.device
    names = arguments.models or MODELS[device]
    arguments.batches = sorted(arguments.batches or BATCHES[device])
    arguments.warm_up = WARM_UP[device] if arguments.warm_up is None else arguments.warm_up
    figures: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__, "models": {}}
    meaning = "the figures mean nothing" if arguments.short else "ratio to the plain trace, relative L2 error"
    print(f"{figures['device']}, PyTorch {torch.__version__}; images per second, {meaning}\n")
    for name in names:
        figures["models"][name] = measure_model(name, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def cores() -> int:
    return len(os.sched_getaffinity(0))


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {cores()} cores"


def warm_up_batches(batches: list[int], warm_up: int) -> list[int]:
    """The batches that our config.pbtxt warms up, in its order; the largest measured batch is max_batch_size."""
    return sorted({1, max(batches), *range(1, min(warm_up, max(batches)) + 1)}, reverse=True)


def measure_model(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one network, print its tables, and return their figures."""
    device, batches = arguments.device, arguments.batches
    network, shape = create_network(name)
    figures: dict[str, Any] = {"shape": shape, "images per second": []}
    titles = ["plain", "published", *(["cores"] if device == "cpu" else [])]
    titles += [] if arguments.no_compile else ["torch.compile"]
    print(f"{name} at {' x '.join(map(str, shape[1:]))}")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        save_forms(network, shape, Path(folder), device, titles)
        order = warm_up_batches(batches, arguments.warm_up)
        measured = sorted(batches, reverse=True)
        workers = {
            title: stack.enter_context(worker(title, folder, device, measured if title == "torch.compile" else order))
            for title in titles
        }
        figures["warm-up"] = {title: ask(each) for title, each in workers.items()}
        for title, seconds in figures["warm-up"].items():
            count = len(measured if title == "torch.compile" else order)
            print(f"  {title}: the warm-up at {count} batches took {seconds:.1f} s")
        ceilings = ask(workers["plain"], "ceilings") if arguments.roofline else None
        print(f"{'batch':>7}" + "".join(f"{title:>26}" for title in titles) + f"{'published / compile':>22}")
        for size in batches:
            row = measure_batch(workers, size, arguments)
            if ceilings:
                value_bytes = 2 if device == "cuda" else 4
                operators = roofline.count_operators(copy.deepcopy(network).to("meta"), shape, size)
                row["roofline"] = roofline.images_per_second(operators, size, ceilings, value_bytes)
            figures["images per second"].append(row)
            print_row(row, titles)
        if ceilings:
            figures["ceilings"] = ceilings._asdict()
            print_ceilings(ceilings, operators, size, value_bytes)
        rows = figures["images per second"]
        first = [f"{title} " + " ".join(f"{row['first'][title]:.0f}" for row in rows) for title in titles]
        print(f"  milliseconds of the first request of each batch after the warm-up: {', '.join(first)}")
    if arguments.first:
        figures["first requests"] = compare_warm_ups(network, shape, device)
    print()
    return figures


def measure_batch(workers: dict[str, Connection], size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure a batch in turns: the images per second of each way, its ratio to the plain trace, and its error."""
    row: dict[str, Any] = {"batch": size, "error": {}, "first": {}, "rate": {}, "ratio": {}}
    for title, each in workers.items():
        row["first"][title], row["error"][title] = ask(each, "first", size)
        if not row["error"][title] < MAX_ERROR:
            sys.exit(f"{title} is wrong at batch {size}: the relative L2 error is {row['error'][title]:.1e}")
    rounds = [{title: ask(each, "rate", size) for title, each in workers.items()} for _ in range(arguments.rounds)]
    for title in workers:
        row["rate"][title] = statistics.median(each[title] for each in rounds)
        row["ratio"][title] = statistics.median(each[title] / each["plain"] for each in rounds)
        if "torch.compile" in workers:
            row[f"{title} / torch.compile"] = statistics.median(each[title] / each["torch.compile"] for each in rounds)
    return row


def print_row(row: dict[str, Any], titles: list[str]) -> None:
    cells = []
    for title in titles:
        rate, share = row["rate"][title], ""
        if "roofline" in row:
            share = f" {rate / row['roofline']:.0%}"
        cells.append(f"{rate:.5g} x {row['ratio'][title]:.2f} {row['error'][title]:.0e}{share}")
    against = row.get("published / torch.compile")
    limit = f"  roofline {row['roofline']:.5g}" if "roofline" in row else ""
    print(f"{row['batch']:>7}" + "".join(f"{cell:>26}" for cell in cells)
          + f"{'-' if against is None else f'{against:.2f}':>22}{limit}", flush=True)  # fmt: skip


def print_ceilings(
    ceilings: roofline.Ceilings, operators: list[roofline.Operator], batch: int, value_bytes: int
) -> None:
    flops = sum(each.flops for each in operators) / batch
    moved = sum(each.values for each in operators) * value_bytes / batch
    print(
        f"  a matrix product reaches {ceilings.flops_per_second / 1e12:.3g} TFLOP/s, a copy "
        f"{ceilings.bytes_per_second / 1e9:.3g} GB/s; at batch {batch} an image has {flops / 1e9:.3g} GFLOP and "
        f"{moved / 1e6:.3g} MB"
    )


def compare_warm_ups(network: torch.nn.Module, shape: tuple[int, ...], device: str) -> dict[str, Any]:
    """Time the first requests of the published model after some warm-ups; prints and returns a row for each."""
    largest = max(FIRST_BATCHES)
    warm_ups = {"no warm-up": [], "1 and the largest": [largest, 1], "every batch": [*range(largest, 0, -1)]}
    rows: dict[str, Any] = {}
    print("\n  milliseconds of the published model: the first three requests at a batch, and the tenth")
    print(
        f"  {'warmed up, twice each':<24}{'it took':>8}" + "".join(f"{f'batch {size}':>22}" for size in FIRST_BATCHES)
    )
    for title, order in warm_ups.items():
        with tempfile.TemporaryDirectory() as folder:
            save_forms(network, shape, Path(folder), device, ["published"])
            with worker("published", folder, device, order) as process:
                seconds = ask(process)
                times = {size: ask(process, "requests", size) for size in FIRST_BATCHES}
                requests = {size: [*ten[:3], ten[9]] for size, ten in times.items()}
        rows[title] = {"seconds": seconds, "requests": requests}
        cells = "".join(f"{' '.join(f'{value:.0f}' for value in each):>22}" for each in requests.values())
        print(f"  {title:<24}{seconds:>6.1f} s{cells}", flush=True)
    return rows


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


def save_forms(network: torch.nn.Module, shape: tuple[int, ...], folder: Path, device: str, titles: list[str]) -> None:
    """Write the files that the processes load, all made on the CPU, and some images with their outputs in fp32."""
    images = torch.randn(CHECKED_IMAGES, *shape)
    paths = {name: folder / name / "model.pt" for name in ("plain", "exact", "published")}
    for path in paths.values():
        path.parent.mkdir()
    with torch.no_grad():
        torch.save({"images": images, "outputs": network(images)}, folder / "images.pt")
        trace = torch.jit.trace(network, images[:TRACED_BATCH], check_trace=False)
        torchscript_graph.save_torchscript(trace, str(paths["plain"]))
        torchscript_graph.save_torchscript(torch.jit.freeze(trace), str(paths["exact"]))
    if device == "cuda":
        cast = torchscript_graph.cast_trace(str(paths["exact"]), "fp16", "channels_last")
        torchscript_gpu.rewrite_for_gpu(cast, [images[:TRACED_BATCH]])
        torchscript_graph.save_torchscript(cast, str(paths["published"]))
    else:
        paths["exact"].rename(paths["published"])
    if "torch.compile" in titles:
        torch.save(network, folder / "network.pt")


# ---------------------------------------------------------------------------------------------------------------
# In the process of one way


@contextlib.contextmanager
def worker(title: str, folder: str, device: str, warm_up: list[int]) -> Iterator[Connection]:
    """Start a process that loads a way and warms it up, and yield the connection to it."""
    context = multiprocessing.get_context("spawn")
    connection, other = context.Pipe()
    process = context.Process(target=serve, args=(other, title, folder, device, warm_up), daemon=True)
    process.start()
    other.close()
    try:
        yield connection
    finally:
        process.kill()
        process.join()


def ask(connection: Connection, *request: Any) -> Any:
    """Return the answer of a process to a request; without one, the seconds of its warm-up."""
    if request:
        connection.send(request)
    try:
        return connection.recv()
    except EOFError:
        sys.exit("a process ended with an error, which stands above")


@torch.inference_mode()
def serve(connection: Connection, title: str, folder: str, device: str, warm_up: list[int]) -> None:
    """Load a way, warm it up, and answer requests."""
    warnings.filterwarnings("ignore", "`torch.jit")
    saved = torch.load(f"{folder}/images.pt", weights_only=True)
    ways = {"torch.compile": compile_network, "cores": load_instances}
    run = ways.get(title, load_script)(title, folder, device)

    def batch_of(size: int) -> torch.Tensor:
        repeats = -(-size // CHECKED_IMAGES)
        images: torch.Tensor = saved["images"].repeat(repeats, 1, 1, 1)[:size].to(device)
        return images

    def request(size: int) -> tuple[float, torch.Tensor]:
        batch = batch_of(size)
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        output = run(batch).cpu()
        return (time.perf_counter() - started) * 1000, output

    def first(size: int) -> tuple[float, float]:
        milliseconds, output = request(size)
        expected = saved["outputs"][:size]
        return milliseconds, float((output[: len(expected)] - expected).norm() / expected.norm())

    answers: dict[str, Callable[..., Any]] = {
        "first": first,
        "rate": lambda size: rate(run, batch_of(size), device),
        "requests": lambda size: [request(size)[0] for _ in range(10)],
        "ceilings": lambda: roofline.measure_ceilings(device, torch.float16 if device == "cuda" else torch.float32),
    }
    started = time.perf_counter()
    for size in warm_up:
        for _ in range(2):
            request(size)
    connection.send(time.perf_counter() - started)
    with contextlib.suppress(EOFError):
        while True:
            name, *values = connection.recv()
            connection.send(answers[name](*values))


def load_script(title: str, folder: str, device: str) -> Run:
    module: Run = torch.jit.load(f"{folder}/{title}/model.pt", device)
    return module


def load_instances(title: str, folder: str, device: str) -> Run:
    """The published file with one instance for each core. A call runs the batch in each of them, at the same time.

    It returns the outputs of all, so that it counts as so many batches.
    """
    modules = [torch.jit.load(f"{folder}/published/model.pt", device) for _ in range(cores())]
    pool = ThreadPoolExecutor(len(modules), initializer=torch.set_num_threads, initargs=(1,))
    barrier = threading.Barrier(len(modules))

    def run_one(module: torch.jit.ScriptModule, batch: torch.Tensor) -> torch.Tensor:
        barrier.wait()  # so that each thread takes one
        with torch.inference_mode():
            output: torch.Tensor = module(batch)
        return output

    def run(batch: torch.Tensor) -> torch.Tensor:
        return torch.cat([each.result() for each in [pool.submit(run_one, module, batch) for module in modules]])

    return run


def compile_network(title: str, folder: str, device: str) -> Run:
    """The network compiled by torch.compile for each batch; on a GPU fp16 inside and channels last, as published."""
    module = torch.load(f"{folder}/network.pt", weights_only=False).to(device)
    if device == "cpu":
        compiled: Run = torch.compile(module, dynamic=False)
        return compiled
    module = module.to(torch.float16).to(memory_format=torch.channels_last)

    def forward(batch: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = module(batch.half().contiguous(memory_format=torch.channels_last))
        return output.float()

    run: Run = torch.compile(forward, dynamic=False)
    return run


def rate(run: Run, batch: torch.Tensor, device: str) -> float:
    """Images per second, over enough requests to fill SECONDS."""
    _, seconds = timed(run, batch, 1)
    images, seconds = timed(run, batch, max(MIN_REQUESTS[device], round(SECONDS[device] / seconds)))
    return images / seconds


def timed(run: Run, batch: torch.Tensor, count: int) -> tuple[int, float]:
    """The images and seconds of some requests; on a GPU by CUDA events."""
    if not batch.is_cuda:
        started = time.perf_counter()
        images = sum(len(run(batch)) for _ in range(count))
        return images, time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        run(batch)
    end.record()
    end.synchronize()
    return len(batch) * count, float(begin.elapsed_time(end)) / 1000


if __name__ == "__main__":
    main()
