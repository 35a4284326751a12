"""The load of a benchmark: closed loops of requests, timed after a warm-up.

    samples ─► a batch ─► 1, 2, 4 threads, each with an instance of its own ─► latencies of requests ─► a Point

An instance of an artifact is what Triton's instance groups hold: a copy, which has a stream of its own on a GPU, and
its share of the cores on a CPU (instances.py). Of a running server an instance is a client. A thread sends its next
request when the last one is answered.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from build_tasks.bench.instances import LOADERS, Instance, Request, wall_clock_request
from build_tasks.bench.records import Point
from build_tasks.errors import UserError, first_lines
from build_tasks.runtime import progress
from build_tasks.runtime.stage import Paths, Settings
from build_tasks.tensors import INPUT

if TYPE_CHECKING:
    import numpy as np

# TorchScript's profiling executor compiles at the first two requests of a shape; the third is as fast as the hundredth.
WARM_UP_REQUESTS = 3  # of every instance at every batch, at least
WARM_UP_SHARE = 0.25  # of the measuring time, at least
MIN_REQUESTS = 3  # that are measured, however long they take


class Sweep(msgspec.Struct, frozen=True):
    """The points of one format: every batch at every concurrency, for `seconds` each."""

    model_format: str
    batches: list[int]
    concurrency: list[int]
    seconds: float


class Measurement(NamedTuple):
    """What a sweep gave: its points, what failed, and how it was timed ("cpu" or "cuda"; no device of a server)."""

    points: list[Point]
    failed: list[str]
    timed_by: str
    device: str | None = None


def measure_artifact(inputs: Paths, sweep: Sweep, settings: Settings) -> Measurement:
    """Measure one format on this machine. It runs in a process of its own.

    Args:
        settings: device (as in [triton]), cores; for the plain trace the settings of its network.
    """
    samples = _read_samples(inputs)
    points: list[Point] = []
    failed: list[str] = []
    for concurrency in sweep.concurrency:
        threads = max(settings["cores"] // concurrency, 1)
        loaded = LOADERS[sweep.model_format](inputs, settings, threads, concurrency)
        batches = samples.astype(loaded.dtype or samples.dtype)
        threads_of_point = threads if loaded.device == "cpu" else None
        # Each library has an exception of its own for a lack of memory, or of a kernel.
        failed += _measure_batches(loaded.instances, batches, sweep, threads_of_point, points, Exception)
    return Measurement(points, failed, loaded.timed_by, loaded.device)


def measure_server(inputs: Paths, sweep: Sweep, url: str, model: str) -> Measurement:
    """Measure a model of a running server with Triton's client for Python, where there is no perf_analyzer.

    Args:
        url: host:port of HTTP.
        model: Its name at the server.
    """
    from build_tasks.serving.smoke import cast_to_input_type
    from build_tasks.serving.triton_client import Client

    samples = _read_samples(inputs)

    def instance(batch: "np.ndarray") -> Request:
        client = Client("HTTP", url)
        tensors = client.tensors(model)
        images = cast_to_input_type(batch, tensors.input_type)
        return wall_clock_request(lambda: client.infer(model, tensors, images))

    points: list[Point] = []
    failed: list[str] = []
    for concurrency in sweep.concurrency:
        failed += _measure_batches([instance] * concurrency, samples, sweep, None, points, UserError)
    return Measurement(points, failed, "Triton's client for Python")


def _read_samples(inputs: Paths) -> "np.ndarray":
    from polygraphy.json import load_json

    samples: np.ndarray = load_json(inputs["samples"])[0][INPUT]
    return samples


def _measure_batches(
    instances: Sequence[Instance],
    samples: "np.ndarray",
    sweep: Sweep,
    threads: int | None,
    points: list[Point],
    expected_error: type[Exception],
) -> list[str]:
    """Measure every batch size of a sweep with these instances, and append to `points`.

    Args:
        threads: Of each instance, on a CPU.
        expected_error: What makes a point fail, and not the whole benchmark. Larger batches are then not tried.
    Returns: What failed.
    """
    for batch in sweep.batches:
        try:
            latencies, images_per_s = run_load(instances, resize_batch(samples, batch), sweep.seconds)
        except expected_error as error:
            return [f"batch {batch} x {len(instances)}: {first_lines(error)}"]
        point = make_point(sweep.model_format, batch, len(instances), threads, latencies, images_per_s)
        points.append(point)
        progress.emit(format_point(point))
    return []


def resize_batch(samples: "np.ndarray", batch: int) -> "np.ndarray":
    """The samples, repeated or cut to the size of the batch."""
    import numpy as np

    filled: np.ndarray = samples[np.arange(batch) % len(samples)]
    return filled


def run_load(instances: Sequence[Instance], batch: "np.ndarray", seconds: float) -> tuple[list[float], float]:
    """Send a batch again and again with every instance, each in a thread, for some seconds after a warm-up.

    Returns: The latencies in seconds, and the throughput in images per second. It is the sum of the instances'
        throughputs, because the last request of one instance may end after the others have ended.
    """
    from concurrent.futures import ThreadPoolExecutor

    barrier = threading.Barrier(len(instances))

    def send_requests(instance: Instance) -> tuple[list[float], float]:
        try:
            request = instance(batch)
            for _ in repeat_request(request, seconds * WARM_UP_SHARE, WARM_UP_REQUESTS):
                pass
            barrier.wait()
        except threading.BrokenBarrierError:
            return [], 1.0  # another thread raises the error
        except BaseException:
            barrier.abort()
            raise
        started = time.perf_counter()
        latencies = list(repeat_request(request, seconds, MIN_REQUESTS))
        return latencies, time.perf_counter() - started

    with ThreadPoolExecutor(len(instances)) as pool:
        results = list(pool.map(send_requests, instances))
    requests_per_s = sum(len(latencies) / elapsed for latencies, elapsed in results)
    return [latency for latencies, _ in results for latency in latencies], requests_per_s * len(batch)


def repeat_request(request: Request, seconds: float, min_requests: int) -> Iterator[float]:
    """Latencies of requests, for some seconds, and of `min_requests` at least."""
    deadline, count = time.perf_counter() + seconds, 0
    while count < min_requests or time.perf_counter() < deadline:
        yield request()
        count += 1


def make_point(
    model_format: str, batch: int, concurrency: int, threads: int | None, latencies: list[float], images_per_s: float
) -> Point:
    """A point from the latencies of its requests, in seconds."""
    import numpy as np

    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    return Point(
        model_format=model_format,
        batch=batch,
        concurrency=concurrency,
        threads=threads,
        requests=len(latencies),
        p50_ms=round(float(p50), 4),
        p99_ms=round(float(p99), 4),
        images_per_s=round(images_per_s, 2),
    )


def format_point(point: Point) -> str:
    """The line that is printed when a point is measured."""
    return (
        f"  {point.model_format:<12} batch {point.batch:>3} x {point.concurrency:<2} "
        f"{point.images_per_s:>9.1f} images/s   p50 {point.p50_ms:.2f} ms, p99 {point.p99_ms:.2f} ms"
    )
