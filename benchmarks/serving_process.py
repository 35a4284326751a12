"""The process of one way of benchmarks/serving.py: it loads the way, warms it up, and times requests."""

import contextlib
import multiprocessing
import os
import sys
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

from build_tasks.formats import aoti_package  # noqa: E402
from build_tasks.runtime import hardware  # noqa: E402

CHECKED_IMAGES = 8  # whose outputs are compared
SECONDS = {"cuda": 0.2, "cpu": 1.0}  # minimum duration of the requests of a round
MIN_REQUESTS = {"cuda": 10, "cpu": 1}
PROFILED = 5  # requests

Run = Callable[[torch.Tensor], torch.Tensor]


def cores() -> int:
    return len(os.sched_getaffinity(0))


def relative_error(outputs: torch.Tensor, exact: torch.Tensor) -> float:
    """The relative L2 error."""
    return float((outputs - exact).norm() / exact.norm())


@contextlib.contextmanager
def process(target: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """Start a process that calls a function with a connection and the arguments, and yield the other end of it."""
    context = multiprocessing.get_context("spawn")
    connection, other = context.Pipe()
    child = context.Process(target=target, args=(other, *arguments), daemon=True)
    child.start()
    other.close()
    try:
        yield connection
    finally:
        child.kill()
        child.join()


def ask(connection: Connection, *request: Any) -> Any:
    """Return the answer of a process to a request; without one, what it sends when it is ready."""
    if request:
        connection.send(request)
    try:
        return connection.recv()
    except EOFError:
        sys.exit("a process ended with an error, which stands above")


@torch.inference_mode()
def serve(connection: Connection, title: str, folder: str, device: str, warm_up: list[int]) -> None:
    """Load a way, warm it up, send the seconds of both, and answer requests."""
    warnings.filterwarnings("ignore", "`torch.jit")
    saved = torch.load(f"{folder}/images.pt", weights_only=True)
    ways = {"torch.compile": compile_network, "cores": load_instances, "aoti": load_package}
    started = time.perf_counter()
    run = ways.get(title, load_script)(title, folder, device)
    loading = time.perf_counter() - started

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
        return milliseconds, relative_error(output[: len(expected)], expected)

    answers: dict[str, Callable[..., Any]] = {
        "first": first,
        "rate": lambda size: rate(run, batch_of(size), device),
        "requests": lambda size: [request(size)[0] for _ in range(10)],
        "profile": lambda size: profile(run, batch_of(size)),
        "ceilings": lambda: roofline.measure_ceilings(device, torch.float16 if device == "cuda" else torch.float32),
    }
    started = time.perf_counter()
    for size in warm_up:
        for _ in range(2):
            request(size)
    connection.send((loading, time.perf_counter() - started))
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


def compile_package(connection: Connection, folder: str, device: str) -> None:
    """Compile the package of AOTInductor, and send the seconds that it took."""
    started = time.perf_counter()
    program = torch.export.load(f"{folder}/program.pt2")
    target = "gpu" if device == "cuda" else "cpu"
    aoti_package.compile_package(
        program, f"{folder}/model.pt2", target, hardware.instruction_set(), hardware.compiler_command()
    )
    connection.send(time.perf_counter() - started)


def load_package(title: str, folder: str, device: str) -> Run:
    package: Run = aoti_package.load_package(f"{folder}/model.pt2")
    return package


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


def profile(run: Run, batch: torch.Tensor) -> tuple[float, dict[str, float]]:
    """The milliseconds of a request without a profiler, and those of its kernels by their names, the longest first."""
    seconds = timed(run, batch, PROFILED)[1]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(PROFILED):
            run(batch)
        torch.cuda.synchronize()
    kernels = {each.key: each.self_device_time_total / 1000 / PROFILED for each in found.key_averages()}
    longest_first = sorted(kernels.items(), key=lambda item: -item[1])
    return seconds / PROFILED * 1000, {name: each for name, each in longest_first if each}


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
