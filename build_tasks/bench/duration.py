"""How long a benchmark will take, from a few requests at its smallest batch.

each format: loaded once, the smallest batch ─► Pace ─► seconds of every point ─► "12 points …: about 210 s"
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from build_tasks.bench.instances import LOADERS, Request
from build_tasks.bench.records import Options
from build_tasks.bench.workload import (
    MIN_REQUESTS,
    WARM_UP_REQUESTS,
    WARM_UP_SHARE,
    Sweep,
    cast_samples,
    read_samples,
    server_request,
)
from build_tasks.runtime.stage import Paths, Settings
from build_tasks.tensors import batch_of, resize


class Pace(NamedTuple):
    """The speed of one format, in seconds."""

    loading: float  # with the first requests, which may compile
    per_image: float


def pace_of_artifact(inputs: Paths, sweep: Sweep, settings: Settings) -> Pace:
    """Return the pace of a format on this machine, with all cores. Call this in a child process."""
    started, samples = time.perf_counter(), read_samples(inputs)
    loaded = LOADERS[sweep.model_format](inputs, settings, settings["cores"], 1)
    batch = resize(cast_samples(samples, loaded.dtypes), sweep.batches[0])
    return _pace(started, loaded.instances[0](batch), batch_of(batch))


def pace_of_server(inputs: Paths, sweep: Sweep, url: str, model: str) -> Pace:
    """Return the pace of a model of a running server. Call this in a child process."""
    started, batch = time.perf_counter(), resize(read_samples(inputs), sweep.batches[0])
    return _pace(started, server_request(url, model, batch), batch_of(batch))


def _pace(started: float, request: Request, images: int) -> Pace:
    for _ in range(WARM_UP_REQUESTS - 1):
        request()
    loading = time.perf_counter() - started
    return Pace(loading, request() / images)


def seconds_of(sweep: Sweep, pace: Pace) -> float:
    """Return how long a sweep will take.

    A batch is assumed to take its share of images times `per_image`, times the number of instances or requests that
    share the cores.
    """
    total = 0.0
    for concurrency in sweep.concurrency:
        total += pace.loading
        for batch in sweep.batches:
            latency = batch * concurrency * pace.per_image
            total += max(sweep.seconds * WARM_UP_SHARE, WARM_UP_REQUESTS * latency)
            total += max(sweep.seconds, MIN_REQUESTS * latency)
    return total


def format_estimate(sweeps: Sequence[Sweep], options: Options, pace_of: Callable[[Sweep], Pace | None]) -> str:
    """Return the line about the duration of a benchmark, with the time that the estimate itself takes.

    Args:
        pace_of: Returns the pace of the format of a sweep; None if it could not be measured.
    """
    started = time.perf_counter()
    paces = [(sweep, pace_of(sweep)) for sweep in sweeps]
    total = sum(seconds_of(sweep, pace) for sweep, pace in paces if pace) + time.perf_counter() - started
    points = sum(len(sweep.batches) * len(sweep.concurrency) for sweep in sweeps)
    return f"  {points} points, at least {options.seconds:g} s each, and a warm-up: about {total:.0f} s"
