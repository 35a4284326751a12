"""The records of `doit bench`: a Run consists of Points, and is kept in bench.json.

    {"model": NAME, "runs": [Run, …]}      the last run of each Machine

The fields have the names of bench.json's keys, except where another key is given in quotes below.
"""

from typing import Any

import msgspec

from build_tasks.json_files import read_json, write_json

TRACE = "trace"  # the plain fp32 trace of the network, which other formats are compared with
COMPILED = "torch.compile"  # the network compiled for each batch; Triton cannot serve it
FROM_NETWORK = (TRACE, COMPILED)  # are made of the network and its weights, not of an artifact that is served
TRTEXEC = "trtexec"  # a plan, measured by NVIDIA's tool


class Options(msgspec.Struct, frozen=True):
    """The options of the command line, checked, and with their defaults.

    Args:
        batches: Batch sizes, ascending.
        concurrency: Numbers of instances on this machine, or of requests at a time at a server.
        seconds: Measuring time of each point.
        formats: Formats of the model, TRACE and COMPILED.
        url: host:port (HTTP) of a running server; empty for this machine.
        latency_ms: Limit for the p99 latency of the proposal.
    """

    batches: list[int]
    concurrency: list[int]
    seconds: float
    formats: list[str]
    url: str
    latency_ms: float | None


class Machine(msgspec.Struct, frozen=True):
    """The machine of a run. Only runs with equal machines are compared."""

    cpu: str
    cores: int
    gpu: str | None = None
    server: str | None = None  # host:port of a running server


class Timing(msgspec.Struct, frozen=True, omit_defaults=True):
    """The device and the clock with which the points of one format were measured."""

    timed_by: str
    device: str | None = None  # "cpu" or "cuda"
    sha256: str | None = None  # sha256 of the artifact


class Point(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Latency and throughput of one format at one batch size and concurrency."""

    model_format: str = msgspec.field(name="format")
    batch: int
    concurrency: int  # instances on this machine, requests at a time at a server
    threads: int | None = None  # number of threads of each instance, on the CPU
    requests: int | None = None  # number of measured requests
    p50_ms: float
    p99_ms: float
    images_per_s: float
    queue_ms: float | None = None  # time in the server's queue, from perf_analyzer
    compute_ms: float | None = None  # time in the server's backend, from perf_analyzer
    vs_trace: float | None = None  # throughput as a multiple of the plain trace's
    vs_compile: float | None = None  # throughput as a multiple of torch.compile's
    vs_last: float | None = None  # throughput as a multiple of the last run's

    @property
    def load(self) -> tuple[int, int, int | None]:
        """The key of a point. Only points with equal keys are compared."""
        return self.batch, self.concurrency, self.threads


class Proposal(msgspec.Struct, frozen=True):
    """The proposal for one format, from its points.

    Args:
        lines: TOML for the spec; empty if no point is within the limit of latency, and at a server.
        reasons: The figures that the lines follow from.
    """

    lines: list[str]
    reasons: list[str]


class Run(msgspec.Struct, frozen=True):
    """One run of `doit bench` for one model. Its lists grow while it measures, and do not change afterwards."""

    machine: Machine
    tools: dict[str, str]  # the version of each tool
    date: str  # UTC, ISO 8601
    measured: dict[str, Timing] = {}  # how each format was measured
    points: list[Point] = []
    failed: list[str] = []  # one message for each measurement that failed
    left_out: list[str] = msgspec.field(
        name="left out", default_factory=list
    )  # one message for each measurement that was not tried
    proposals: dict[str, Proposal] = {}  # the proposal for each format


def read_runs(path: str) -> list[Run]:
    """The last run of each machine, from bench.json. A run that cannot be read is left out."""
    try:
        runs = read_json(path)["runs"]
    except (OSError, ValueError, KeyError, TypeError):  # there is no file, or it is damaged
        return []
    return [run for run in map(_read_run, runs if isinstance(runs, list) else []) if run]


def _read_run(value: Any) -> Run | None:
    try:
        return msgspec.convert(value, Run)
    except msgspec.ValidationError:
        return None


def write_runs(path: str, model: str, runs: list[Run]) -> None:
    """Write bench.json."""
    write_json(path, {"model": model, "runs": [msgspec.to_builtins(run) for run in runs]})
