"""bench: latency and throughput of the artifacts of a model -> bench.json for programs, bench.svg for people

    this machine (machine.py) ────────┐
    a running server (server.py) ─────┴► a Run ─► compared with the last run and the plain trace (results.py)
                                                  └► lines for [triton] of the spec (recommendation.py)

It runs only on demand, and every time: earlier figures may not be true any more.
"""

import contextlib
import math
import sys
import time
from typing import Any

import msgspec
from doit.exceptions import TaskFailed

from build_tasks.bench import machine, results, server
from build_tasks.bench.records import COMPILED, TRACE, Options, read_runs
from build_tasks.errors import UserError, with_suggestion
from build_tasks.runtime import atomic_files, hardware
from build_tasks.spec.model import Model
from build_tasks.text_table import terminal_width

DEFAULT_BATCHES = (1, 8, 32, 128)  # batches below max_batch_size of the spec; max_batch_size is added
DEFAULT_INSTANCES = (1, 2, 4)  # on a CPU, those below the number of cores, and that number
DEFAULT_REQUESTS = (1, 4, 16)  # number of requests at a time, for a server

PARAMS = [
    {"name": "batches", "long": "batches", "type": str, "default": "", "help": "such as 1,8,32"},
    {
        "name": "concurrency", "long": "concurrency", "type": str, "default": "",
        "help": "instances, such as 1,2,4; at a server, requests at a time",
    },
    {"name": "seconds", "long": "seconds", "type": str, "default": "2", "help": "measuring time of each point"},
    {
        "name": "formats", "long": "formats", "type": str, "default": "",
        "help": f"such as onnx,{TRACE},{COMPILED}; default: all but {COMPILED}",
    },
    {"name": "url", "long": "url", "type": str, "default": "", "help": "host:port (HTTP) of a running server"},
    {
        "name": "latency", "long": "latency", "type": str, "default": "",
        "help": "limit for p99, in milliseconds, in what is proposed",
    },
]  # fmt: skip


def task(model: Model) -> dict[str, Any]:
    """doit's task `bench:NAME`."""
    paths = {
        path
        for model_format in machine.measurable_formats(model)
        for path in machine.input_paths(model, model_format).values()
    }
    return {
        "name": model.name,
        "actions": [(bench, [model])],
        "file_dep": sorted(paths),
        "uptodate": [False],
        "params": PARAMS,
        "io": {"capture": False},
        "doc": "Latency and throughput of every format, and what they propose for [triton] -> bench.json, bench.svg",
    }


def bench(
    model: Model, batches: str, concurrency: str, seconds: str, formats: str, url: str, latency: str
) -> dict[str, Any] | TaskFailed:
    """doit's action: measure, compare, propose, and write bench.json and bench.svg."""
    started = time.perf_counter()
    try:
        options = parse_options(model, batches, concurrency, seconds, formats, url, latency)
        runs = read_runs(model.artifact("bench.json"))
        atomic_files.make_folder(hardware.GPU_LOCK)
        # Another benchmark, or the build of an engine, would disturb this one.
        with atomic_files.locked(hardware.GPU_LOCK):
            run = (server if url else machine).measure(model, options)
        if not run.points:
            raise UserError("; ".join(run.failed or run.left_out))
        last = next((each for each in runs if each.machine == run.machine), None)
        run = results.compare(run, last)
        run = msgspec.structs.replace(run, proposals=results.proposals(model, run, options.latency_ms))
        files = results.write_results(model, [*(each for each in runs if each is not last), run], run)
    except UserError as error:
        return TaskFailed(str(error))
    print(results.format_run(run, last, terminal_width(sys.stdout)), flush=True)
    if run.failed:
        return TaskFailed(f"not everything could be measured: {'; '.join(run.failed)}")
    servable = [point for point in run.points if point.model_format != COMPILED]
    best = max(servable or run.points, key=lambda point: point.images_per_s)
    return {
        "seconds": round(time.perf_counter() - started, 3),
        "notes": {
            "best": f"{best.model_format} {best.images_per_s:.1f} images/s (batch {best.batch} x {best.concurrency})",
            "files": ", ".join(files),
        },
    }


def parse_options(
    model: Model, batches: str, concurrency: str, seconds: str, formats: str, url: str, latency: str
) -> Options:
    """The options of the command line.

    Raises:
        UserError: If an option has an impossible value.
    """
    default_formats = [name for name in machine.formats_of(model) if not url or name in model.served_formats]
    if not default_formats:
        raise UserError(f"Triton serves no format of {model.name}")
    valid = [*default_formats, *([] if url else machine.comparisons_of(model))]
    requested = formats.split(",") if formats else default_formats
    for name in requested:
        if name not in valid:
            raise UserError(f"--formats: expected some of {', '.join(valid)}, found {with_suggestion(name, valid)}")
    host, _, port = url.removeprefix("http://").rpartition(":")
    if url and not (host and port.isdecimal()):
        raise UserError(f"--url: expected host:port, found {url!r}")
    default = list(DEFAULT_REQUESTS if url else DEFAULT_INSTANCES)
    if not url and not isinstance(hardware.gpu(), hardware.Gpu):
        default = [*(count for count in default if count < (cores := results.cores())), cores]
    return Options(
        batches=parse_counts("--batches", batches) or default_batches(model),
        concurrency=parse_counts("--concurrency", concurrency) or default,
        seconds=parse_positive("--seconds", seconds),
        formats=requested,
        url=f"{host}:{port}" if url else "",
        latency_ms=parse_positive("--latency", latency) if latency else None,
    )


def default_batches(model: Model) -> list[int]:
    """Some batches up to the largest of each format, and the largest. Of a fixed batch only that batch."""
    batches: set[int] = set()
    for model_format in model.spec.formats:
        largest = model.spec.profile[2] if model_format == "rtx" else model.largest_batch(model_format)
        batches |= {*(batch for batch in DEFAULT_BATCHES if batch < largest), largest or model.spec.onnx.batch_size}
    return sorted(batches)


def parse_counts(option: str, text: str) -> list[int]:
    """The numbers of a list such as "1,8,32", ascending; an empty list for an empty text."""
    if not text:
        return []
    if not all(part.strip().isdecimal() and int(part) for part in text.split(",")):
        raise UserError(f"{option}: expected whole numbers from 1 on, such as 1,8,32, found {text!r}")
    return sorted({int(part) for part in text.split(",")})


def parse_positive(option: str, text: str) -> float:
    """A finite number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise UserError(f"{option}: expected a number above 0, found {text!r}")
