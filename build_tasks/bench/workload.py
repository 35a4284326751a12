"""The load of a benchmark: every thread sends its next request when the previous one is answered (a closed loop).

    samples ─► a batch ─► 1, 2, 4 threads, each with its own instance ─► warm-up ─► latencies of requests ─► a Point

On this machine an instance is a copy of the artifact, as in an instance group. It has its own stream on a GPU, or its
share of the cores on a CPU (see instances.py). For a running server it is a client connection.
"""

import functools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from build_tasks.bench.instances import LOADERS, Instance, Request, wall_clock_request
from build_tasks.bench.records import Point
from build_tasks.errors import UserError, first_lines
from build_tasks.runtime import progress
from build_tasks.runtime.stage import Paths, Settings
from build_tasks.tensors import Feed, batch_of, resize

# TorchScript's profiling executor compiles at the first two requests of a shape; the third is as fast as the hundredth.
WARM_UP_REQUESTS = 3  # minimum number of warm-up requests per instance and batch size
WARM_UP_SHARE = 0.25  # minimum duration of the warm-up, as a share of the measuring time
MIN_REQUESTS = 3  # minimum number of measured requests per instance, even if they take longer than the measuring time


class Sweep(msgspec.Struct, frozen=True):
    """The points to measure for one format: every batch size with every concurrency, each for `seconds`."""

    model_format: str
    batches: list[int]
    concurrency: list[int]
    seconds: float


class Measurement(NamedTuple):
    """The result of a sweep."""

    points: list[Point]
    failed: list[str]  # one message for each concurrency that failed
    timed_by: str  # the clock, or the tool that measured
    device: str | None = None  # "cpu" or "cuda"; None for a server


def measure_artifact(inputs: Paths, sweep: Sweep, settings: Settings) -> Measurement:
    """Measure one format on this machine. Call this in a child process.

    Args:
        settings: device (as in [triton]), cores; for the plain trace the settings of its network.
    """
    samples = read_samples(inputs)
    points: list[Point] = []
    failed: list[str] = []
    for concurrency in sweep.concurrency:
        threads = max(settings["cores"] // concurrency, 1)
        loaded = LOADERS[sweep.model_format](inputs, settings, threads, concurrency)
        typed_samples = cast_samples(samples, loaded.dtypes)
        threads_of_point = threads if loaded.device == "cpu" else None
        # Every library raises another exception if memory is short or a kernel is missing.
        failed += _measure_batches(loaded.instances, typed_samples, sweep, threads_of_point, points, Exception)
    return Measurement(points, failed, loaded.timed_by, loaded.device)


def measure_server(inputs: Paths, sweep: Sweep, url: str, model: str) -> Measurement:
    """Measure a model of a running server with Triton's client for Python, if there is no perf_analyzer.

    Args:
        url: host:port of HTTP.
        model: The model's name on the server.
    """
    samples = read_samples(inputs)
    points: list[Point] = []
    failed: list[str] = []
    for concurrency in sweep.concurrency:
        instances = [functools.partial(server_request, url, model)] * concurrency
        failed += _measure_batches(instances, samples, sweep, None, points, UserError)
    return Measurement(points, failed, "Triton's client for Python")


def server_request(url: str, model: str, feed: Feed) -> Request:
    """A request to a model of a running server, with a client of its own. It is a sequence if the model wants that."""
    from build_tasks.serving.sample_requests import new_sequence, takes_sequences
    from build_tasks.serving.triton_client import Client, cast_to_input_types

    client = Client("HTTP", url)
    tensors, sequences = client.tensors(model), takes_sequences(client, client.config(model))
    arrays = cast_to_input_types(feed, tensors)
    return wall_clock_request(lambda: client.infer(model, tensors, arrays, new_sequence() if sequences else 0))


def read_samples(inputs: Paths) -> Feed:
    """The accuracy samples."""
    from polygraphy.json import load_json

    return dict(load_json(inputs["samples"])[0])


def cast_samples(samples: Feed, dtypes: Mapping[str, str]) -> Feed:
    """The samples in the types of an artifact's inputs, by name."""
    return {name: samples[name].astype(object if dtype == "string" else dtype) for name, dtype in dtypes.items()}


def _measure_batches(
    instances: Sequence[Instance],
    samples: Feed,
    sweep: Sweep,
    threads: int | None,
    points: list[Point],
    expected_error: type[Exception],
) -> list[str]:
    """Measure every batch size of a sweep with these instances, and append to `points`.

    Args:
        threads: The number of threads of each instance on a CPU; None on a GPU or for a server.
        expected_error: The exception that ends only this loop over the batch sizes, not the whole benchmark.
    Returns: A message about the batch size that failed; empty if none failed.
    """
    for batch in sweep.batches:
        try:
            latencies, images_per_s = run_load(instances, resize(samples, batch), sweep.seconds)
        except expected_error as error:
            return [f"batch {batch} x {len(instances)}: {first_lines(error)}"]
        point = make_point(sweep.model_format, batch, len(instances), threads, latencies, images_per_s)
        points.append(point)
        progress.emit(format_point(point))
    return []


def run_load(instances: Sequence[Instance], feed: Feed, seconds: float) -> tuple[list[float], float]:
    """Send a batch again and again with every instance, each in a thread, for some seconds after a warm-up.

    Returns: The latencies in seconds, and the throughput in images per second. It is the sum of the instances'
        throughputs, because the last request of one instance may end after the others have ended.
    """
    from concurrent.futures import ThreadPoolExecutor

    barrier = threading.Barrier(len(instances))

    def send_requests(instance: Instance) -> tuple[list[float], float]:
        try:
            request = instance(feed)
            for _ in repeat_request(request, seconds * WARM_UP_SHARE, WARM_UP_REQUESTS):
                pass
            barrier.wait()
        except threading.BrokenBarrierError:
            return [], 1.0  # another thread raises its error, so this result is not used; 1.0 avoids a division by zero
        except BaseException:
            barrier.abort()
            raise
        started = time.perf_counter()
        latencies = list(repeat_request(request, seconds, MIN_REQUESTS))
        return latencies, time.perf_counter() - started

    with ThreadPoolExecutor(len(instances)) as pool:
        results = list(pool.map(send_requests, instances))
    requests_per_s = sum(len(latencies) / elapsed for latencies, elapsed in results)
    return [latency for latencies, _ in results for latency in latencies], requests_per_s * batch_of(feed)


def repeat_request(request: Request, seconds: float, min_requests: int) -> Iterator[float]:
    """Send requests for some seconds, and at least `min_requests`. Yields the latency of each."""
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
    """The line that is printed after a point was measured."""
    return (
        f"  {point.model_format:<12} batch {point.batch:>3} x {point.concurrency:<2} "
        f"{point.images_per_s:>9.1f} images/s   p50 {point.p50_ms:.2f} ms, p99 {point.p99_ms:.2f} ms"
    )
